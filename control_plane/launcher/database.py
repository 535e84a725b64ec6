"""What the launcher does with the database: bring it to the newest schema, and hand out the first API key."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from control_plane import secrets
from control_plane.settings import Settings

FIRST_KEY_NAME = "first admin"
LOCAL_KEY_NAME = "llmos command"


def upgrade(settings: Settings) -> None:
    from control_plane import upgrade_database

    _log_warnings_only()
    with _reachable():
        upgrade_database(settings)


def register_installed(settings: Settings, own: str | None) -> list[str]:
    """Take installed versions into the registry that it does not know; the models that have a production version.

    ``own`` is the digest of the one that this installation made itself.
    """
    from control_plane.artifacts import artifact_store
    from control_plane.registry.adoption import adopt_installed
    from control_plane.registry.deployments import served_models

    with _application(settings):
        adopt_installed(settings, artifact_store(settings), own)
        return served_models()


def has_models(settings: Settings) -> bool:
    """Whether the registry knows any model, served or not."""
    from control_plane.registry.services import find_models

    with _application(settings):
        return bool(find_models(None, None, 1))


def create_first_key(settings: Settings) -> str | None:
    """The plain text of an administrator's key, if there is no key at all yet."""
    from sqlalchemy import select

    from control_plane.auth.tables import ApiKey
    from control_plane.extensions import db

    with _application(settings):
        has_a_key = db.session.scalar(select(ApiKey.id).limit(1)) is not None
    return None if has_a_key else create_key(settings, FIRST_KEY_NAME, "admin")


def ensure_local_key(settings: Settings) -> None:
    """See that the ``llmos`` command has a valid administrator's key, in a file that only its owner may read."""
    from control_plane.auth import services
    from control_plane.errors import Unauthorized

    key = secrets.local_api_key(settings)
    with _application(settings):
        try:
            if key is not None:
                services.authenticate(key)
                return
        except Unauthorized:
            pass  # Revoked, expired, or of another database.
    secrets.store_local_api_key(settings, create_key(settings, LOCAL_KEY_NAME, "admin"))


def create_key(settings: Settings, name: str, role: str, **limits: Any) -> str:
    """Store a new API key and return its plain text, which cannot be had again. Raises BadRequest."""
    from control_plane.auth import services
    from control_plane.auth.key_params import KeyParams

    with _application(settings):
        return services.make_key(KeyParams(name, role, **limits))[1]


def _log_warnings_only() -> None:
    """A person at a terminal need not hear of every revision and every key."""
    import structlog

    logging.getLogger("alembic").setLevel(logging.WARNING)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))


@contextmanager
def _application(settings: Settings) -> Iterator[None]:
    from control_plane import create_app
    from control_plane.extensions import db

    with create_app(settings).app_context(), _reachable():
        try:
            yield
        finally:
            # The launcher lives on; a database server counts its connections.
            db.engine.dispose()


@contextmanager
def _reachable() -> Iterator[None]:
    """Raises DatabaseUnavailable for a person at a terminal."""
    from control_plane.databases import UNREACHABLE, reason_of
    from control_plane.errors import DatabaseUnavailable

    try:
        yield
    except UNREACHABLE as error:
        reason = reason_of(error)
        raise DatabaseUnavailable(
            f"the database does not answer: {reason}; start it or mend LLMOS_DATABASE_URL"
        ) from error
