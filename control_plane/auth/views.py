"""Routes of keys, users, sessions and the audit log under /api/v1: parse, one service call, render."""

from __future__ import annotations

from typing import Any

from apiflask import APIBlueprint
from flask import Response, current_app, jsonify, request

from control_plane.auth import audit, services, sessions, users
from control_plane.auth.principal import current_principal
from control_plane.auth.roles import SCOPES
from control_plane.auth.schemas import (
    KeyIn,
    LoginIn,
    PasswordChange,
    UserChange,
    UserIn,
    audit_out,
    key_out,
    session_out,
    user_out,
)
from control_plane.auth.services import require_key
from control_plane.auth.tables import UserSession
from control_plane.errors import BadRequest, NotFound
from control_plane.requests import expected_revision, page, parse_body, query_number, query_text, with_etag

auth = APIBlueprint("auth", __name__, url_prefix="/api/v1")

MAX_PAGE = 200


@auth.get("/keys")
@require_key("admin")
def list_keys() -> dict[str, Any]:
    limit = query_number("limit", 50, most=MAX_PAGE)
    return page(services.find_keys(query_text("before"), limit + 1), limit, key_out)


@auth.post("/keys")
@require_key("admin")
def create_key() -> Response:
    """The answer is the only place where the plain text of the key is ever shown."""
    key, plain_text = services.make_key(parse_body(KeyIn).params())
    response = _no_store(jsonify({**key_out(key), "key": plain_text}))
    response.status_code = 201
    response.headers["Location"] = f"/api/v1/keys/{key.prefix}"
    return response


@auth.get("/keys/<prefix>")
@require_key("viewer", *SCOPES)
def show_key(prefix: str) -> dict[str, Any]:
    """``self`` is the key that asks; others are shown to administrators."""
    return key_out(services.get_key(prefix))


@auth.delete("/keys/<prefix>")
@require_key("viewer", *SCOPES)
def revoke_key(prefix: str) -> dict[str, Any]:
    return key_out(services.revoke_key(prefix))


@auth.get("/users")
@require_key("admin")
def list_users() -> dict[str, Any]:
    limit = query_number("limit", 50, most=MAX_PAGE)
    return page(users.find_users(query_text("after"), limit + 1), limit, user_out)


@auth.post("/users")
@require_key("admin")
def create_user() -> Response:
    body = parse_body(UserIn)
    response = with_etag(user_out(users.create_user(body.name, body.password, body.role)))
    response.status_code = 201
    response.headers["Location"] = f"/api/v1/users/{body.name}"
    return response


@auth.get("/users/<name>")
@require_key("admin")
def show_user(name: str) -> Response:
    return with_etag(user_out(users.get_user(name)))


@auth.patch("/users/<name>")
@require_key("admin")
def edit_user(name: str) -> Response:
    """With ``If-Match: "<revision>"`` the edit is refused if somebody else was faster."""
    edit = parse_body(UserChange).edit()
    return with_etag(user_out(users.edit_user(name, edit, expected_revision())))


@auth.post("/session")
def log_in() -> Response:
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
def show_session() -> Response:
    return _no_store(jsonify(session_out(_session(), request.cookies[sessions.COOKIE])))


@auth.patch("/session")
@require_key("viewer", *SCOPES)
def change_password() -> Response:
    """One's own password; everywhere that one is signed in, one has to sign in again."""
    body = parse_body(PasswordChange)
    sessions.change_password(_session(), body.current_password, body.password)
    return _signed_out()


@auth.delete("/session")
@require_key("viewer", *SCOPES)
def log_out() -> Response:
    sessions.log_out(_session())
    return _signed_out()


@auth.get("/audit")
@require_key("admin")
def list_audit_events() -> dict[str, Any]:
    limit, before = query_number("limit", 50, most=MAX_PAGE), query_number("before", 0) or None
    found = audit.find(query_text("actor"), query_text("action"), query_text("object"), before, limit + 1)
    return page(found, limit, audit_out)


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
