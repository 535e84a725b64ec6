"""What the application is built on and every domain may import: the database, its migrations, the task queue.

``init_extensions`` ties them to one application; nothing here knows a table, a task or a route.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from celery import Celery
from flask import Flask
from flask_migrate import Migrate
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import MetaData, event, make_url
from sqlalchemy.orm import DeclarativeBase

from control_plane import databases
from control_plane.settings import Settings

MIGRATIONS_DIR = Path(__file__).resolve().parent / "migrations"
DEFAULT_QUEUE = "default"


class Base(DeclarativeBase):
    """Base class of every table. Constraints have names, so that migrations can change them on every database."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(column_0_label)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


def now() -> datetime:
    """The current time in UTC without a zone: SQLite keeps none, so every column of ours means UTC."""
    return datetime.now(UTC).replace(tzinfo=None)


def iso(at: datetime | None) -> str | None:
    """ISO 8601 in UTC, to the millisecond."""
    return None if at is None else f"{at.isoformat(timespec='milliseconds')}Z"


db = SQLAlchemy(model_class=Base)
migrate = Migrate()


def init_extensions(app: Flask, settings: Settings) -> None:
    settings.home.mkdir(parents=True, exist_ok=True)
    app.config["SQLALCHEMY_DATABASE_URI"] = settings.database_url
    app.config["SQLALCHEMY_ENGINE_OPTIONS"] = databases.engine_options(make_url(settings.database_url))
    db.init_app(app)
    migrate.init_app(app, db, directory=str(MIGRATIONS_DIR), render_as_batch=True)
    with app.app_context():
        event.listen(db.engine, "connect", databases.prepare)
    app.extensions["celery"] = create_celery(settings)


def create_celery(settings: Settings) -> Celery:
    """The task queue, for those that send tasks and for the workers."""
    celery = Celery("llmos")
    celery.conf.update(
        broker_url=settings.redis_url,
        # SQL is the record of what became of a task; results in Redis would be a second one.
        task_ignore_result=True,
        imports=("control_plane.jobs.tasks",),
        task_default_queue=DEFAULT_QUEUE,
        accept_content=["json"],
        task_serializer="json",
        # A message only wakes a worker; which job runs, and that it runs once, is decided in SQL (jobs/services.py).
        # So messages are acknowledged at once, and a job goes on while Redis is away.
        task_acks_late=False,
        worker_prefetch_multiplier=1,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        # A Redis that is gone must show within seconds, not hang a web request.
        broker_transport_options={
            "socket_timeout": 10,
            "socket_connect_timeout": 2,
        },
        broker_connection_retry_on_startup=True,
        # Once more at once: the pooled connection may be one to a Redis that was restarted.
        task_publish_retry_policy={"max_retries": 1, "interval_start": 0, "interval_max": 0},
        worker_hijack_root_logger=False,
    )
    celery.set_default()
    return celery
