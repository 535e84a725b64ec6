"""Routes of models, versions, aliases and deployments under /api/v1: parse, one service call, render."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from apiflask import APIBlueprint
from flask import Response, current_app, jsonify, request

from control_plane.auth.services import require_key, role_allows
from control_plane.errors import BadRequest
from control_plane.registry import deployments, services, serving_state
from control_plane.registry.schemas import (
    AliasIn,
    DeploymentIn,
    ModelEdit,
    alias_out,
    deployment_out,
    evaluation_out,
    model_out,
    summary_out,
    version_out,
)
from control_plane.registry.serving_state import ServingState
from control_plane.registry.tables import IN_PROGRESS, Alias, Model
from control_plane.requests import page, parse_body, query_number, query_text
from control_plane.settings import Settings

models = APIBlueprint("models", __name__, url_prefix="/api/v1")

MAX_PAGE = 200
MAX_NUMBER = 10**9 - 1


@models.get("/models")
@require_key("viewer")
def list_models() -> dict[str, Any]:
    limit = query_number("limit", 50, most=MAX_PAGE)
    found = services.find_models(query_text("after"), query_text("prefix"), limit + 1)
    serving, aliases = _serving(), deployments.aliases_of(summary.model for summary in found)
    return page(found, limit, lambda summary: summary_out(summary, aliases[summary.model.id], serving))


@models.get("/models/<name>")
@require_key("viewer")
def show_model(name: str) -> Response:
    model = services.get_model(name)
    return _with_etag(model_out(model, _aliases(model)))


@models.patch("/models/<name>")
@require_key("operator")
def edit_model(name: str) -> Response:
    """With ``If-Match: "<revision>"`` the edit is refused if somebody else was faster."""
    model = services.edit_model(name, parse_body(ModelEdit).changes, _expected_revision())
    return _with_etag(model_out(model, _aliases(model)))


@models.get("/models/<name>/versions")
@require_key("viewer")
def list_versions(name: str) -> dict[str, Any]:
    limit, before = query_number("limit", 50, most=MAX_PAGE), _before()
    found = services.find_versions(name, before, limit + 1)
    serving, aliases = _serving(), _aliases(services.get_model(name))
    return page(found, limit, lambda version: version_out(version, name, aliases, serving))


@models.get("/models/<name>/versions/<int:number>")
@require_key("viewer")
def show_version(name: str, number: int) -> dict[str, Any]:
    version = services.get_version(name, min(number, MAX_NUMBER + 1))
    return version_out(version, name, _aliases(version.model), _serving())


@models.post("/models/<name>/versions/<int:number>/retire")
@require_key("operator")
def retire_version(name: str, number: int) -> dict[str, Any]:
    """It is never served again, and its files may be collected as garbage."""
    version = deployments.retire(name, min(number, MAX_NUMBER + 1))
    return version_out(version, name, _aliases(version.model), _serving())


@models.get("/models/<name>/aliases")
@require_key("viewer")
def list_aliases(name: str) -> dict[str, Any]:
    return {"data": [alias_out(alias) for alias in _aliases(services.get_model(name))]}


@models.put("/models/<name>/aliases/<alias>")
@require_key("operator")
def set_alias(name: str, alias: str) -> Response:
    """Production and canary are moved by deployments only."""
    version = parse_body(AliasIn).version
    return _with_etag(alias_out(deployments.set_alias(name, alias, version, _expected_revision())))


@models.delete("/models/<name>/aliases/<alias>")
@require_key("operator")
def delete_alias(name: str, alias: str) -> Response:
    deployments.delete_alias(name, alias)
    return Response(status=204)


@models.get("/models/<name>/deployments")
@require_key("viewer")
def list_deployments(name: str) -> dict[str, Any]:
    """The history of what was served, newest first."""
    limit, before = query_number("limit", 50, most=MAX_PAGE), _before()
    return page(deployments.history(name, before, limit + 1), limit, deployment_out)


@models.post("/models/<name>/deployments")
@require_key("operator")
def deploy(name: str) -> Response:
    """Promote, roll back, canary, abort or withdraw; 201 if that is done, 202 if its version has to be loaded first.

    With ``If-Match: "<revision of the production alias>"`` it is refused if somebody else was faster.
    """
    body, settings = parse_body(DeploymentIn), _settings()
    deployment = deployments.deploy(
        name,
        body.kind,
        _serving(),
        number=body.version,
        weight=body.weight,
        reason=body.reason,
        force=body.force,
        may_force=role_allows("admin"),
        warm=timedelta(seconds=settings.warm_s),
        revision=_expected_revision(),
    )
    response = jsonify(deployment_out(deployment))
    response.status_code = 202 if deployment.state == IN_PROGRESS else 201
    response.headers["Location"] = f"/api/v1/models/{name}/deployments/{deployment.id}"
    return response


@models.get("/models/<name>/deployments/<int:deployment_id>")
@require_key("viewer")
def show_deployment(name: str, deployment_id: int) -> dict[str, Any]:
    return deployment_out(deployments.get_deployment(name, min(deployment_id, MAX_NUMBER)))


@models.get("/models/<name>/evaluations")
@require_key("viewer")
def list_evaluations(name: str) -> dict[str, Any]:
    """What was measured of a model's versions, newest first; ``version`` narrows it to one."""
    limit, before = query_number("limit", 50, most=MAX_PAGE), _before()
    number = query_number("version", 0, least=0, most=MAX_NUMBER) or None
    return page(services.find_evaluations(name, number, before, limit + 1), limit, evaluation_out)


def _with_etag(document: dict[str, Any]) -> Response:
    response = jsonify(document)
    response.set_etag(str(document["revision"]))
    return response


def _expected_revision() -> int | None:
    given = request.headers.get("If-Match")
    if given is None or given.strip() == "*":
        return None
    revision = given.strip().strip('"')
    if not (revision.isascii() and revision.isdecimal() and len(revision) < 10):
        raise BadRequest(f"If-Match has value {given!r:.100}; expected the ETag of the object, as GET gives it")
    return int(revision)


def _before() -> int | None:
    return query_number("before", 0, least=0, most=MAX_NUMBER) or None


def _aliases(model: Model) -> list[Alias]:
    return deployments.aliases_of([model])[model.id]


def _serving() -> ServingState:
    return serving_state.read(_settings())


def _settings() -> Settings:
    settings: Settings = current_app.config["SETTINGS"]
    return settings
