"""Routes of keys under /api/v1: parse, one service call, render."""

from __future__ import annotations

from typing import Any

from apiflask import APIBlueprint
from flask import Response, jsonify

from control_plane.auth import services
from control_plane.auth.roles import SCOPES
from control_plane.auth.schemas import KeyIn, key_out
from control_plane.auth.services import require_key
from control_plane.requests import page, parse_body, query_number, query_text

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
    response = jsonify({**key_out(key), "key": plain_text})
    response.status_code = 201
    response.headers["Location"] = f"/api/v1/keys/{key.prefix}"
    response.headers["Cache-Control"] = "no-store"
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
