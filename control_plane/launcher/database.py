"""What the launcher does with the database: bring it to the newest schema, and hand out the first API key."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from control_plane.settings import Settings

if TYPE_CHECKING:
    from flask.ctx import AppContext

FIRST_KEY_NAME = "first admin"


def upgrade(settings: Settings) -> None:
    from control_plane import upgrade_database

    _log_warnings_only()
    upgrade_database(settings)


def create_first_key(settings: Settings) -> str | None:
    """The plain text of an administrator's key, if there is no key at all yet."""
    from sqlalchemy import select

    from control_plane.auth.tables import ApiKey
    from control_plane.extensions import db

    with _application(settings):
        has_a_key = db.session.scalar(select(ApiKey.id).limit(1)) is not None
    return None if has_a_key else create_key(settings, FIRST_KEY_NAME, "admin")


def create_key(settings: Settings, name: str, role: str) -> str:
    """Store a new API key and return its plain text, which cannot be had again. Raises BadRequest."""
    from control_plane.auth import services

    with _application(settings):
        return services.create_key(name, role)


def _log_warnings_only() -> None:
    """A person at a terminal need not hear of every revision and every key."""
    import structlog

    logging.getLogger("alembic").setLevel(logging.WARNING)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))


def _application(settings: Settings) -> AppContext:
    from control_plane import create_app

    return create_app(settings).app_context()
