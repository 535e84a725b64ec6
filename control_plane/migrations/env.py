"""Alembic's entry point, run by Flask-Migrate inside an application context: the application's engine and tables."""

from __future__ import annotations

from alembic import context
from flask import current_app

from control_plane.extensions import db

with db.engine.connect() as connection:
    arguments = current_app.extensions["migrate"].configure_args
    context.configure(connection=connection, target_metadata=db.metadata, **arguments)
    with context.begin_transaction():
        context.run_migrations()
