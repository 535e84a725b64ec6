"""Signed-in users: a session is a random token in a cookie, of which only the sha256 is stored.

A cookie is sent by the browser whatever page asks, so a request that changes something must also carry the CSRF token:
it is derived from the session's token, and only a page of ours can read it.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from datetime import timedelta

import structlog
from flask import request
from sqlalchemy import delete, select, update

from control_plane.auth import audit
from control_plane.auth.hashes import sha256
from control_plane.auth.limits import rate_limits
from control_plane.auth.principal import Principal
from control_plane.auth.roles import scopes_of
from control_plane.auth.tables import User, UserSession
from control_plane.auth.users import NAME, UserEdit, edit_user, passwords
from control_plane.errors import Forbidden, InvalidSession, LoginFailed
from control_plane.extensions import db, now

COOKIE = "llmos_session"
CSRF_HEADER = "X-CSRF-Token"
LIFETIME = timedelta(hours=12)
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")

log = structlog.get_logger(__name__)


def log_in(name: str, password: str) -> tuple[UserSession, str]:
    """A new session and its token; raises LoginFailed with one sentence, after one time, for every reason."""
    user = _verified(name, password)
    _keep_hash(user, password)
    # Whatever this browser was signed in with ends, as does what has expired.
    replaced = UserSession.token_sha256 == sha256(request.cookies.get(COOKIE, ""))
    expired = (UserSession.user_id == user.id) & (UserSession.expires_at <= now())
    db.session.execute(delete(UserSession).where(replaced | expired))
    token = secrets.token_urlsafe(32)
    session = UserSession(token_sha256=sha256(token), user=user, expires_at=now() + LIFETIME)
    db.session.add(session)
    audit.record("session.create", user.name, actor=_actor(user))
    db.session.commit()
    return session, token


def log_out(session: UserSession) -> None:
    """From now on the token is refused."""
    audit.record("session.revoke", session.user.name)
    db.session.delete(session)
    db.session.commit()


def change_password(session: UserSession, current: str, new: str) -> None:
    """A user's own; ends all of their sessions, this one too. Raises LoginFailed unless ``current`` is right."""
    user = _verified(session.user.name, current)
    edit_user(user.name, UserEdit(password=new), user.revision)


def get_session(token_sha256: str | None) -> UserSession:
    """The session if it is still valid; raises InvalidSession."""
    session = db.session.scalar(select(UserSession).where(UserSession.token_sha256 == token_sha256))
    if session is None or session.expires_at <= now() or not session.user.is_active:
        raise InvalidSession("the session has ended; sign in again with POST /api/v1/session")
    return session


def identify(token: str) -> Principal:
    """Who sent the current request with this cookie; raises InvalidSession, or Forbidden without the CSRF token."""
    session = get_session(sha256(token))
    given = request.headers.get(CSRF_HEADER, "")
    if request.method not in SAFE_METHODS and not hmac.compare_digest(given.encode(), csrf_token(token).encode()):
        raise Forbidden(f"a request that changes something needs the header {CSRF_HEADER}; GET /api/v1/session has it")
    return principal(session)


def principal(session: UserSession) -> Principal:
    role = session.user.role
    return Principal(actor=_actor(session.user), role=role, scopes=scopes_of(role), token_sha256=session.token_sha256)


def csrf_token(token: str) -> str:
    return hmac.new(token.encode("utf-8", errors="surrogatepass"), b"csrf", hashlib.sha256).hexdigest()


def _verified(name: str, password: str) -> User:
    with rate_limits().failed_logins(request.remote_addr):
        user_id, password_hash = _known(name)
        # Give the connection back: comparing takes its time.
        db.session.rollback()
        is_right = passwords().verify(password_hash, password)
        user = db.session.get(User, user_id) if is_right else None
        if user is None or not user.is_active or user.password_hash != password_hash:
            raise _failed()
        return user


def _keep_hash(user: User, password: str) -> None:
    """Renew an outdated hash. A write even if there is nothing to renew: it holds the row until the session is there,
    so that a new password given meanwhile either is seen here or ends this session, too.
    """
    known = user.password_hash
    renewed = passwords().hash(password) if passwords().is_outdated(known) else known
    is_same = (User.id == user.id) & (User.password_hash == known) & User.is_active.is_(True)
    kept = db.session.execute(update(User).where(is_same).values(password_hash=renewed))
    if not kept.rowcount:  # type: ignore[attr-defined]
        db.session.rollback()
        raise _failed()


def _failed() -> LoginFailed:
    log.warning("login_failed", address=request.remote_addr)
    return LoginFailed("the name or the password is not right")


def _known(name: str) -> tuple[int | None, str | None]:
    if NAME.fullmatch(name):
        row = db.session.execute(select(User.id, User.password_hash).where(User.name == name)).one_or_none()
        if row is not None:
            return row.id, row.password_hash
    return None, None


def _actor(user: User) -> str:
    return f"user:{user.name}"
