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
from sqlalchemy import delete, select

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
    if passwords().is_outdated(user.password_hash):
        user.password_hash = passwords().hash(password)
    db.session.execute(delete(UserSession).where(UserSession.user_id == user.id, UserSession.expires_at <= now()))
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


def get_session(session_id: int | None) -> UserSession:
    """The session if it is still valid; raises InvalidSession."""
    session = None if session_id is None else db.session.get(UserSession, session_id)
    return _valid(session)


def identify(token: str) -> Principal:
    """Who sent the current request with this cookie; raises InvalidSession, or Forbidden without the CSRF token."""
    session = _valid(db.session.scalar(select(UserSession).where(UserSession.token_sha256 == sha256(token))))
    given = request.headers.get(CSRF_HEADER, "")
    if request.method not in SAFE_METHODS and not hmac.compare_digest(given.encode(), csrf_token(token).encode()):
        raise Forbidden(f"a request that changes something needs the header {CSRF_HEADER}; GET /api/v1/session has it")
    return principal(session)


def principal(session: UserSession) -> Principal:
    role = session.user.role
    return Principal(actor=_actor(session.user), role=role, scopes=scopes_of(role), session_id=session.id)


def csrf_token(token: str) -> str:
    return hmac.new(token.encode("utf-8", errors="surrogatepass"), b"csrf", hashlib.sha256).hexdigest()


def _verified(name: str, password: str) -> User:
    with rate_limits().failed_logins(request.remote_addr):
        user_id, password_hash = _known(name)
        # Give the connection back: comparing takes its time.
        db.session.rollback()
        is_right = passwords().verify(password_hash, password)
        # Looked at again, because the password may have been changed, or the user deactivated, meanwhile.
        query = select(User).where(User.id == user_id, User.password_hash == password_hash, User.is_active.is_(True))
        user = db.session.scalar(query) if is_right else None
        if user is None:
            log.warning("login_failed", address=request.remote_addr)
            raise LoginFailed("the name or the password is not right")
        return user


def _known(name: str) -> tuple[int | None, str | None]:
    if NAME.fullmatch(name):
        row = db.session.execute(select(User.id, User.password_hash).where(User.name == name)).one_or_none()
        if row is not None:
            return row.id, row.password_hash
    return None, None


def _valid(session: UserSession | None) -> UserSession:
    if session is None or session.expires_at <= now() or not session.user.is_active:
        raise InvalidSession("the session has ended; sign in again with POST /api/v1/session")
    return session


def _actor(user: User) -> str:
    return f"user:{user.name}"
