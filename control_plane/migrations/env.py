"""Alembic's entry point, run by Flask-Migrate inside an application context: the application's engine and tables."""

from __future__ import annotations

from alembic import context
from flask import current_app

from control_plane.extensions import db

LOCK_ID = 0x6C6C6D6F73  # "llmos"

with db.engine.connect() as connection:
    arguments = current_app.extensions["migrate"].configure_args
    context.configure(connection=connection, target_metadata=db.metadata, **arguments)
    with context.begin_transaction():
        if connection.dialect.name == "postgresql":
            # Two that start at once: the second waits for the first and finds its work done.
            connection.exec_driver_sql("SET LOCAL lock_timeout = '60s'")
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({LOCK_ID})")
        context.run_migrations()
