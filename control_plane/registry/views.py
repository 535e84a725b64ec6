"""Routes of models and versions under /api/v1: parse, one service call, render."""

from __future__ import annotations

from typing import Any

from apiflask import APIBlueprint
from flask import current_app
from werkzeug.http import quote_etag

from control_plane.auth.services import require_key
from control_plane.errors import PreconditionFailed
from control_plane.operations import ETAG, Operation, Page
from control_plane.registry import services, serving_state
from control_plane.registry.schemas import (
    MAX_NUMBER,
    ModelEdit,
    ModelOut,
    ModelQuery,
    SummaryOut,
    VersionOut,
    VersionQuery,
    model_out,
    summary_out,
    version_out,
)
from control_plane.registry.serving_state import ServingState
from control_plane.requests import IfMatch, page

models = APIBlueprint("models", __name__, url_prefix="/api/v1")


@models.get("/models")
@require_key("viewer")
@Operation(Page[SummaryOut], query=ModelQuery)
def list_models(query: ModelQuery) -> dict[str, Any]:
    """Models by name, each with its newest version and what is served of it."""
    found = services.find_models(query.after, query.prefix, query.limit + 1)
    serving = _serving()
    return page(found, query.limit, lambda summary: summary_out(summary, serving))


@models.get("/models/<name>")
@require_key("viewer")
@Operation(ModelOut, sends=ETAG)
def show_model(name: str) -> tuple[dict[str, Any], dict[str, str]]:
    """One model."""
    return _with_etag(model_out(services.get_model(name)))


@models.patch("/models/<name>")
@require_key("operator")
@Operation(ModelOut, headers=IfMatch, body=ModelEdit, errors=(PreconditionFailed,), sends=ETAG)
def edit_model(name: str, headers: IfMatch, body: ModelEdit) -> tuple[dict[str, Any], dict[str, str]]:
    """Change a model's description.

    With ``If-Match: "<revision>"`` the edit is refused if somebody else was faster.
    """
    return _with_etag(model_out(services.describe_model(name, body.description, headers.revision)))


@models.get("/models/<name>/versions")
@require_key("viewer")
@Operation(Page[VersionOut], query=VersionQuery)
def list_versions(name: str, query: VersionQuery) -> dict[str, Any]:
    """Versions of a model, newest first."""
    found = services.find_versions(name, query.before, query.limit + 1)
    serving = _serving()
    return page(found, query.limit, lambda version: version_out(version, name, serving))


@models.get("/models/<name>/versions/<int:number>")
@require_key("viewer")
@Operation(VersionOut)
def show_version(name: str, number: int) -> dict[str, Any]:
    """One version, with what its certificate says."""
    return version_out(services.get_version(name, min(number, MAX_NUMBER + 1)), name, _serving())


def _with_etag(document: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    return document, {"ETag": quote_etag(str(document["revision"]))}


def _serving() -> ServingState:
    return serving_state.read(current_app.config["SETTINGS"])
