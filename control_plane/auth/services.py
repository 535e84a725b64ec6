"""API keys, and the door of every route: ``require_key`` finds out who asks and whether they may."""

from __future__ import annotations

import hmac
import re
import secrets
from collections.abc import Callable
from datetime import datetime, timedelta
from functools import wraps
from typing import ParamSpec, TypeVar

import structlog
from flask import current_app, g, request
from sqlalchemy import select, update
from sqlalchemy.exc import OperationalError

from control_plane.auth import audit, sessions
from control_plane.auth.hashes import sha256
from control_plane.auth.key_params import KeyParams
from control_plane.auth.principal import Principal
from control_plane.auth.roles import DEFAULT_SCOPE, scopes_of
from control_plane.auth.tables import ApiKey
from control_plane.databases import UNREACHABLE
from control_plane.errors import ControlPlaneError, Forbidden, NotFound, Unauthorized
from control_plane.extensions import db, iso, now

SCHEME = "llmos"
OWN = "self"
IDENTITY = "llmos.identity"
PREFIX = re.compile(r"[0-9a-f]{12}")
LAST_USED_PRECISION = timedelta(minutes=1)

log = structlog.get_logger(__name__)
P = ParamSpec("P")
R = TypeVar("R")


def create_key(name: str, role: str, expires_at: datetime | None = None) -> str:
    """The plain text of a new key that may do all that its role may."""
    return make_key(KeyParams(name, role, expires_at=expires_at))[1]


def make_key(params: KeyParams) -> tuple[ApiKey, str]:
    """Store a new key; the second value is its plain text, which cannot be had again. Raises BadRequest."""
    params = params.checked()
    prefix, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
    key = ApiKey(
        prefix=prefix,
        secret_sha256=sha256(secret),
        name=params.name,
        role=params.role,
        scopes=params.scopes,
        models=params.models,
        requests_per_minute=params.requests_per_minute,
        tokens_per_minute=params.tokens_per_minute,
        expires_at=params.expires_at,
        created_by=audit.current_actor(),
    )
    db.session.add(key)
    audit.record("key.create", prefix, **{**vars(params), "expires_at": iso(params.expires_at)})
    db.session.commit()
    log.info("api_key_created", prefix=prefix, role=params.role)
    return key, f"{SCHEME}_{prefix}_{secret}"


def find_keys(before: str | None, limit: int) -> list[ApiKey]:
    """Newest first; ``before`` is the prefix of the last key of the page before."""
    query = select(ApiKey).order_by(ApiKey.id.desc()).limit(limit)
    if before is not None:
        query = query.where(ApiKey.id < _get(before).id)
    return list(db.session.scalars(query))


def get_key(prefix: str) -> ApiKey:
    """The key with this prefix, or with ``self`` the one that asks; others are shown to administrators only."""
    return _get(_visible(prefix))


def revoke_key(prefix: str) -> ApiKey:
    """From now on the key is refused; revoking twice changes nothing. Anybody may revoke the key that they use."""
    key = _get(_visible(prefix))
    is_active = (ApiKey.id == key.id) & ApiKey.revoked_at.is_(None)
    revoked = db.session.execute(update(ApiKey).where(is_active).values(revoked_at=now()))
    if revoked.rowcount:  # type: ignore[attr-defined]
        audit.record("key.revoke", key.prefix)
        log.info("api_key_revoked", prefix=key.prefix)
    db.session.commit()
    return key


def authenticate(plain_text: str) -> ApiKey:
    """The key's row; raises Unauthorized with the same sentence for every reason that a stranger could probe."""
    scheme, _, rest = plain_text.partition("_")
    prefix, _, secret = rest.partition("_")
    key = _find(prefix) if scheme == SCHEME else None
    # Compared even without a row, so that the time taken does not tell whether the prefix exists.
    matches = hmac.compare_digest(sha256(secret), key.secret_sha256 if key else sha256("no such key"))
    if key is None or not matches:
        raise Unauthorized("the API key is not valid; expected llmos_<prefix>_<secret> as made by this installation")
    _check_active(key)
    _note_use(key)
    return key


def identify() -> Principal:
    """Who sent the current request, found out once; raises Unauthorized, or Forbidden without a CSRF token."""
    if IDENTITY not in request.environ:
        try:
            request.environ[IDENTITY] = _identify()
        except (ControlPlaneError, *UNREACHABLE) as error:
            request.environ[IDENTITY] = error
    found: Principal | Exception = request.environ[IDENTITY]
    if isinstance(found, Exception):
        raise found
    return found


def known_principal() -> Principal | None:
    """Who sent the current request, None for a stranger or while the database is away."""
    try:
        return identify()
    except (ControlPlaneError, *UNREACHABLE):
        return None


def known_payer() -> Principal | None:
    """Whose requests of this minute the current one is among: what is public costs nobody any.

    The index page asks for its state every few seconds, with the key that somebody typed into it.
    """
    view = current_app.view_functions.get(request.endpoint or "")
    return None if view is None or role_of(view) is None else known_principal()


def require_key(role: str, *scopes: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator of a view: 401 for a stranger, 403 unless their role is at least ``role`` and one of ``scopes`` is
    theirs. Without ``scopes`` it is the one of the role (``roles.DEFAULT_SCOPE``).
    """
    needed = scopes or (DEFAULT_SCOPE[role],)

    def decorate(view: Callable[P, R]) -> Callable[P, R]:
        @wraps(view)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            principal = identify()
            principal.require(role, needed)
            g.principal, g.needed = principal, (role, needed)
            # Give the connection back: a view may take minutes, and the pool has 15 for all threads.
            db.session.rollback()
            return view(*args, **kwargs)

        wrapper.__dict__["role"] = role
        return wrapper

    return decorate


def role_of(view: Callable[..., object]) -> str | None:
    """The role that a view needs; None if it is public."""
    return getattr(view, "role", None)


def identify_again(principal: Principal) -> Principal:
    """The principal as it is now; raises Unauthorized if it is not valid any more."""
    if principal.key_prefix is None:
        return sessions.principal(sessions.get_session(principal.token_sha256))
    key = _get(principal.key_prefix)
    _check_active(key)
    return _principal(key)


def _identify() -> Principal:
    """By the key, or else by the cookie."""
    token = request.cookies.get(sessions.COOKIE)
    if token and "Authorization" not in request.headers:
        return sessions.identify(token)
    return _principal(authenticate(_bearer()))


def _principal(key: ApiKey) -> Principal:
    return Principal(
        actor=f"key:{key.prefix}",
        role=key.role,
        scopes=tuple(scopes_of(key.role) if key.scopes is None else key.scopes),
        models=None if key.models is None else tuple(key.models),
        requests_per_minute=key.requests_per_minute,
        tokens_per_minute=key.tokens_per_minute,
        key_prefix=key.prefix,
    )


def _visible(prefix: str) -> str:
    """The prefix that is meant, if whoever asks may see its key. Outside of requests everything is visible."""
    principal: Principal | None = g.get("principal")
    if principal is None:
        return prefix
    if prefix == OWN:
        if principal.key_prefix is None:
            raise NotFound(f"{principal.actor} uses no API key; GET /api/v1/session tells who is signed in")
        return principal.key_prefix
    if prefix != principal.key_prefix and "admin" not in principal.scopes:
        raise Forbidden(f"other API keys are shown to administrators only; {principal.actor} may see /api/v1/keys/self")
    return prefix


def _bearer() -> str:
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise Unauthorized("no API key was given; send it as 'Authorization: Bearer llmos_…', or sign in")
    return token.strip()


def _get(prefix: str) -> ApiKey:
    key = _find(prefix)
    if key is None:
        raise NotFound(f"there is no API key with prefix {prefix!r:.100}; GET /api/v1/keys lists those that there are")
    return key


def _find(prefix: str) -> ApiKey | None:
    return db.session.scalar(select(ApiKey).where(ApiKey.prefix == prefix)) if PREFIX.fullmatch(prefix) else None


def _check_active(key: ApiKey) -> None:
    state = key.state(now())
    if state != "active":
        raise Unauthorized(f"the API key {key.prefix!r} is {state}; ask for a new one")


def _note_use(key: ApiKey) -> None:
    at = now()
    if key.last_used_at is not None and at - key.last_used_at < LAST_USED_PRECISION:
        return
    key.last_used_at = at
    try:
        db.session.commit()
    except OperationalError:
        # A note is not worth a failed request when the database is locked.
        db.session.rollback()
