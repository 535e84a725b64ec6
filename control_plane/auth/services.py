"""Making, checking and revoking API keys.

Roles are ordered; a role may do what those before it may: ``viewer`` sees, ``developer`` generates, ``operator``
changes what is served, ``admin`` hands out keys.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Callable
from datetime import datetime, timedelta
from functools import wraps
from typing import ParamSpec, TypeVar

import structlog
from flask import g, request
from sqlalchemy import select
from sqlalchemy.exc import OperationalError

from control_plane.auth import audit
from control_plane.auth.tables import ApiKey
from control_plane.errors import BadRequest, Forbidden, NotFound, Unauthorized
from control_plane.extensions import db, now

ROLES = ("viewer", "developer", "operator", "admin")
SCHEME = "llmos"
LAST_USED_PRECISION = timedelta(minutes=1)
MAX_NAME_LENGTH = 100

log = structlog.get_logger(__name__)
P = ParamSpec("P")
R = TypeVar("R")


def create_key(name: str, role: str, expires_at: datetime | None = None) -> str:
    """Store a new key and return its plain text, which cannot be had again. ``expires_at`` is UTC without a zone."""
    if role not in ROLES:
        raise BadRequest(f"role has value {role!r}; expected one of {', '.join(ROLES)}")
    if not 1 <= len(name) <= MAX_NAME_LENGTH:
        raise BadRequest(f"name has {len(name)} characters; expected 1 to {MAX_NAME_LENGTH}")
    prefix, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
    db.session.add(ApiKey(prefix=prefix, secret_sha256=_sha256(secret), name=name, role=role, expires_at=expires_at))
    audit.record("key.create", prefix, name=name, role=role)
    db.session.commit()
    log.info("api_key_created", prefix=prefix, role=role)
    return f"{SCHEME}_{prefix}_{secret}"


def revoke_key(prefix: str) -> None:
    """From now on the key is refused; revoking twice changes nothing."""
    key = _find(prefix)
    if key is None:
        raise NotFound(f"there is no API key with prefix {prefix!r}")
    if key.revoked_at is None:
        key.revoked_at = now()
        audit.record("key.revoke", prefix)
    db.session.commit()
    log.info("api_key_revoked", prefix=prefix)


def authenticate(plain_text: str) -> ApiKey:
    """The key's row; raises Unauthorized with the same sentence for every reason that a stranger could probe."""
    scheme, _, rest = plain_text.partition("_")
    prefix, _, secret = rest.partition("_")
    key = _find(prefix) if scheme == SCHEME else None
    # Compared even without a row, so that the time taken does not tell whether the prefix exists.
    matches = hmac.compare_digest(_sha256(secret), key.secret_sha256 if key else _sha256("no such key"))
    if key is None or not matches:
        raise Unauthorized("the API key is not valid; expected llmos_<prefix>_<secret> as made by this installation")
    at = now()
    if not key.is_valid(at):
        raise Unauthorized(f"the API key {prefix!r} is {'revoked' if key.revoked_at else 'expired'}; ask for a new one")
    _note_use(key, at)
    return key


def require_key(role: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator of a view: answers 401 without a valid bearer key and 403 if its role is below ``role``."""
    needed = ROLES.index(role)

    def decorate(view: Callable[P, R]) -> Callable[P, R]:
        @wraps(view)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            key = authenticate(_bearer())
            if ROLES.index(key.role) < needed:
                raise Forbidden(f"this needs the role {role!r}; the API key {key.prefix!r} has {key.role!r}")
            g.actor, g.role = f"key:{key.prefix}", key.role
            # Give the connection back: a view may take minutes, and the pool has 15 for all threads.
            db.session.rollback()
            return view(*args, **kwargs)

        wrapper.__dict__["role"] = role
        return wrapper

    return decorate


def role_of(view: Callable[..., object]) -> str | None:
    """The role that a view needs; None if it is public."""
    return getattr(view, "role", None)


def role_allows(role: str) -> bool:
    """Whether whoever is behind the current request may do what ``role`` may."""
    return ROLES.index(g.role) >= ROLES.index(role)


def _bearer() -> str:
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise Unauthorized("no API key was given; send it as 'Authorization: Bearer llmos_…'")
    return token.strip()


def _find(prefix: str) -> ApiKey | None:
    return db.session.scalar(select(ApiKey).where(ApiKey.prefix == prefix))


def _note_use(key: ApiKey, at: datetime) -> None:
    if key.last_used_at is not None and at - key.last_used_at < LAST_USED_PRECISION:
        return
    key.last_used_at = at
    try:
        db.session.commit()
    except OperationalError:
        # A note is not worth a failed request when the database is locked.
        db.session.rollback()


def _sha256(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", errors="surrogatepass")).hexdigest()
