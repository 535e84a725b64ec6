"""Routes of keys, users, sessions and the audit log under /api/v1: parse, one service call, render."""

from __future__ import annotations

from typing import Any

from apiflask import APIBlueprint
from flask import Response, current_app, jsonify, request

from control_plane.auth import audit, services, sessions, users
from control_plane.auth.principal import current_principal
from control_plane.auth.roles import SCOPES
from control_plane.auth.schemas import (
    AuditOut,
    AuditQuery,
    KeyIn,
    KeyOut,
    KeyQuery,
    LoginIn,
    NewKeyOut,
    PasswordChange,
    SessionOut,
    UserChange,
    UserIn,
    UserOut,
    UserQuery,
    audit_out,
    key_out,
    session_out,
    user_out,
)
from control_plane.auth.services import require_key
from control_plane.auth.tables import UserSession
from control_plane.errors import (
    BadRequest,
    Conflict,
    DatabaseUnavailable,
    NotFound,
    Overloaded,
    PreconditionFailed,
    RateLimited,
    Unauthorized,
)
from control_plane.operations import ETAG, NO_STORE, Operation, Page, with_etag
from control_plane.requests import IfMatch, page, parse_body

auth = APIBlueprint("auth", __name__, url_prefix="/api/v1")

Tagged = tuple[dict[str, Any], dict[str, str]]
LOCATION = {"Location": "where it is shown"}


@auth.get("/keys")
@require_key("admin")
@Operation(Page[KeyOut], query=KeyQuery, errors=(NotFound,))
def list_keys(query: KeyQuery) -> dict[str, Any]:
    """API keys, newest first."""
    return page(services.find_keys(query.before, query.limit + 1), query.limit, key_out)


@auth.post("/keys")
@require_key("admin")
@Operation(NewKeyOut, 201, body=KeyIn, sends={**LOCATION, **NO_STORE})
def create_key(body: KeyIn) -> Tagged:
    """Make a key; this answer is the only place where its plain text is ever shown."""
    key, plain_text = services.make_key(body.params())
    headers = {"Location": f"/api/v1/keys/{key.prefix}", "Cache-Control": "no-store"}
    return {**key_out(key), "key": plain_text}, headers


@auth.get("/keys/<prefix>")
@require_key("viewer", *SCOPES)
@Operation(KeyOut)
def show_key(prefix: str) -> dict[str, Any]:
    """One key: ``self`` is the one that asks; others are shown to administrators."""
    return key_out(services.get_key(prefix))


@auth.delete("/keys/<prefix>")
@require_key("viewer", *SCOPES)
@Operation(KeyOut)
def revoke_key(prefix: str) -> dict[str, Any]:
    """Refuse a key from now on: one's own, or, as an administrator, any."""
    return key_out(services.revoke_key(prefix))


@auth.get("/users")
@require_key("admin")
@Operation(Page[UserOut], query=UserQuery)
def list_users(query: UserQuery) -> dict[str, Any]:
    """Users by name."""
    return page(users.find_users(query.after, query.limit + 1), query.limit, user_out)


@auth.post("/users")
@require_key("admin")
@Operation(UserOut, 201, body=UserIn, errors=(Conflict, Overloaded), sends={**LOCATION, **ETAG})
def create_user(body: UserIn) -> Tagged:
    """Make a user."""
    document, headers = with_etag(user_out(users.create_user(body.name, body.password, body.role)))
    return document, {**headers, "Location": f"/api/v1/users/{body.name}"}


@auth.get("/users/<name>")
@require_key("admin")
@Operation(UserOut, sends=ETAG)
def show_user(name: str) -> Tagged:
    """One user."""
    return with_etag(user_out(users.get_user(name)))


@auth.patch("/users/<name>")
@require_key("admin")
@Operation(UserOut, headers=IfMatch, body=UserChange, errors=(Conflict, PreconditionFailed, Overloaded), sends=ETAG)
def edit_user(name: str, headers: IfMatch, body: UserChange) -> Tagged:
    """Change role, password, or whether somebody may sign in.

    With ``If-Match: "<revision>"`` the edit is refused if somebody else was faster.
    """
    return with_etag(user_out(users.edit_user(name, body.edit(), headers.revision)))


@auth.post("/session")
@Operation(
    SessionOut, 201, reads=LoginIn, errors=(Unauthorized, RateLimited, DatabaseUnavailable, Overloaded), sends=NO_STORE
)
def log_in() -> Response:
    """Sign in with name and password; the answer sets a cookie."""
    # A form of another site can post any text, but not JSON: so nobody is signed in as somebody else unawares.
    if request.mimetype != "application/json":
        raise BadRequest(f"Content-Type has value {request.mimetype!r:.100}; expected application/json")
    body = parse_body(LoginIn)
    session, token = sessions.log_in(body.name, body.password)
    response = _no_store(jsonify(session_out(session, token)))
    response.status_code = 201
    is_secure = request.is_secure or not current_app.config["SETTINGS"].is_loopback
    lifetime_s = int(sessions.LIFETIME.total_seconds())
    response.set_cookie(
        sessions.COOKIE, token, max_age=lifetime_s, httponly=True, samesite="Strict", secure=is_secure, path="/"
    )
    return response


@auth.get("/session")
@require_key("viewer", *SCOPES)
@Operation(SessionOut, errors=(NotFound,), sends=NO_STORE)
def show_session() -> Tagged:
    """Who is signed in."""
    return session_out(_session(), request.cookies[sessions.COOKIE]), {"Cache-Control": "no-store"}


@auth.patch("/session")
@require_key("viewer", *SCOPES)
@Operation(None, 204, body=PasswordChange, errors=(NotFound, RateLimited, PreconditionFailed, Overloaded))
def change_password(body: PasswordChange) -> Response:
    """Change one's own password; everywhere that one is signed in, one has to sign in again."""
    sessions.change_password(_session(), body.current_password, body.password)
    return _signed_out()


@auth.delete("/session")
@require_key("viewer", *SCOPES)
@Operation(None, 204, errors=(NotFound,))
def log_out() -> Response:
    """Sign out."""
    sessions.log_out(_session())
    return _signed_out()


@auth.get("/audit")
@require_key("admin")
@Operation(Page[AuditOut], query=AuditQuery)
def list_audit_events(query: AuditQuery) -> dict[str, Any]:
    """Who changed what, newest first."""
    found = audit.find(query.actor, query.action, query.object, query.before, query.limit + 1)
    return page(found, query.limit, audit_out)


def _session() -> UserSession:
    principal = current_principal()
    if principal.token_sha256 is None:
        raise NotFound(f"nobody is signed in: {principal.actor} asks; GET /api/v1/keys/self shows what it may do")
    return sessions.get_session(principal.token_sha256)


def _signed_out() -> Response:
    response = Response(status=204)
    response.delete_cookie(sessions.COOKIE, path="/", httponly=True, samesite="Strict")
    return response


def _no_store(response: Response) -> Response:
    response.headers["Cache-Control"] = "no-store"
    return response
