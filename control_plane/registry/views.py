"""Routes of models and versions under /api/v1: parse, one service call, render."""

from __future__ import annotations

from typing import Any

from apiflask import APIBlueprint
from flask import Response, current_app

from control_plane.auth.services import require_key
from control_plane.registry import services, serving_state
from control_plane.registry.schemas import ModelEdit, model_out, summary_out, version_out
from control_plane.registry.serving_state import ServingState
from control_plane.requests import expected_revision, page, parse_body, query_number, query_text, with_etag

models = APIBlueprint("models", __name__, url_prefix="/api/v1")

MAX_PAGE = 200
MAX_NUMBER = 10**9 - 1


@models.get("/models")
@require_key("viewer")
def list_models() -> dict[str, Any]:
    limit = query_number("limit", 50, most=MAX_PAGE)
    found = services.find_models(query_text("after"), query_text("prefix"), limit + 1)
    serving = _serving()
    return page(found, limit, lambda summary: summary_out(summary, serving))


@models.get("/models/<name>")
@require_key("viewer")
def show_model(name: str) -> Response:
    return with_etag(model_out(services.get_model(name)))


@models.patch("/models/<name>")
@require_key("operator")
def edit_model(name: str) -> Response:
    """With ``If-Match: "<revision>"`` the edit is refused if somebody else was faster."""
    edit = parse_body(ModelEdit)
    return with_etag(model_out(services.describe_model(name, edit.description, expected_revision())))


@models.get("/models/<name>/versions")
@require_key("viewer")
def list_versions(name: str) -> dict[str, Any]:
    limit = query_number("limit", 50, most=MAX_PAGE)
    before = query_number("before", 0, most=MAX_NUMBER) or None
    found = services.find_versions(name, before, limit + 1)
    serving = _serving()
    return page(found, limit, lambda version: version_out(version, name, serving))


@models.get("/models/<name>/versions/<int:number>")
@require_key("viewer")
def show_version(name: str, number: int) -> dict[str, Any]:
    return version_out(services.get_version(name, min(number, MAX_NUMBER + 1)), name, _serving())


def _serving() -> ServingState:
    return serving_state.read(current_app.config["SETTINGS"])
