"""What differs between SQLite and PostgreSQL, made equal: waiting for locks, lost servers, odd texts and numbers.

    sqlite      a file: readers beside one writer (WAL), a lock is waited for
    postgresql  a server, through psycopg: found dead within seconds, a lock is waited for as long as SQLite's

It knows no table. ``extensions`` hands it every new connection.
"""

from __future__ import annotations

import json
import math
import sqlite3
from typing import Any

from sqlalchemy import URL, Text
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.types import TypeDecorator

LOCK_TIMEOUT_MS = 5000
# https://www.postgresql.org/docs/current/libpq-connect.html: without these a server whose machine vanished hangs every
# request for minutes.
POSTGRESQL_CONNECTION = {
    "connect_timeout": 5,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,
    # Plans that the server keeps per connection break behind a pooler and when a migration changes a table.
    "prepare_threshold": None,
    "client_encoding": "utf8",
}
UNREACHABLE = (OperationalError, InterfaceError, PoolTimeout)
"""What is raised when a database does not answer, or not in time; trying again is right."""


class AnyText(TypeDecorator[str]):
    """Text from anywhere, a dying child's last words for one: what PostgreSQL cannot store is replaced by ``�``."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: object) -> str | None:
        if value is None:
            return None
        return value.replace("\0", "�").encode("utf-8", errors="replace").decode("utf-8")


def engine_options(url: URL) -> dict[str, Any]:
    """Options of ``create_engine``; what the URL says itself wins."""
    # Parameters of a failed statement may be hashes of secrets, and errors are logged.
    options: dict[str, Any] = {"pool_pre_ping": True, "json_serializer": to_json, "hide_parameters": True}
    if url.get_backend_name() == "postgresql":
        options["connect_args"] = {k: v for k, v in POSTGRESQL_CONNECTION.items() if k not in url.query}
    return options


def prepare(connection: Any, _record: object) -> None:
    """Called with every new DBAPI connection."""
    cursor = connection.cursor()
    if isinstance(connection, sqlite3.Connection):
        cursor.execute(f"PRAGMA busy_timeout={LOCK_TIMEOUT_MS}")
        for pragma in ("journal_mode=WAL", "foreign_keys=ON", "synchronous=NORMAL"):
            cursor.execute(f"PRAGMA {pragma}")
    else:
        cursor.execute(f"SET lock_timeout = {LOCK_TIMEOUT_MS}")
        connection.commit()
    cursor.close()


def reason_of(error: Exception) -> str:
    """What the driver said, on one line and without the statement."""
    return " ".join(str(getattr(error, "orig", None) or error).split())


def to_json(value: Any) -> str:
    """JSON without NaN and infinities, which SQLite stores and PostgreSQL refuses: they become null."""
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value
