"""Routes of models, versions, aliases and deployments under /api/v1: parse, one service call, render."""

from __future__ import annotations

from typing import Any

from apiflask import APIBlueprint
from flask import Response, current_app, jsonify

from control_plane.auth.principal import current_principal
from control_plane.auth.services import require_key
from control_plane.errors import Conflict, PreconditionFailed
from control_plane.operations import ETAG, Operation, Page, with_etag
from control_plane.registry import aliases, deployments, needs, services, serving_state
from control_plane.registry.schemas import (
    MAX_NUMBER,
    AliasesOut,
    AliasIn,
    AliasOut,
    ArtifactOut,
    ArtifactQuery,
    DeploymentIn,
    DeploymentOut,
    DeploymentQuery,
    EvaluationOut,
    EvaluationQuery,
    ModelEdit,
    ModelOut,
    ModelQuery,
    SummaryOut,
    VersionOut,
    VersionQuery,
    alias_out,
    deployment_out,
    evaluation_out,
    model_out,
    summary_out,
    version_out,
)
from control_plane.registry.serving_state import ServingState
from control_plane.registry.tables import IN_PROGRESS
from control_plane.requests import IfMatch, page
from control_plane.settings import Settings

models = APIBlueprint("models", __name__, url_prefix="/api/v1")

Tagged = tuple[dict[str, Any], dict[str, str]]
LOCATION = {"Location": "where the deployment is shown"}


@models.get("/models")
@require_key("viewer")
@Operation(Page[SummaryOut], query=ModelQuery)
def list_models(query: ModelQuery) -> dict[str, Any]:
    """Models by name, each with its newest version and what is served of it."""
    found = services.find_models(query.after, query.prefix, query.limit + 1)
    serving, of_models = _serving(), aliases.of_models(summary.model for summary in found)
    return page(found, query.limit, lambda summary: summary_out(summary, of_models[summary.model.id], serving))


@models.get("/models/<name>")
@require_key("viewer")
@Operation(ModelOut, sends=ETAG)
def show_model(name: str) -> Tagged:
    """One model."""
    model = services.get_model(name)
    return with_etag(model_out(model, aliases.of_model(model)))


@models.patch("/models/<name>")
@require_key("operator")
@Operation(ModelOut, headers=IfMatch, body=ModelEdit, errors=(PreconditionFailed,), sends=ETAG)
def edit_model(name: str, headers: IfMatch, body: ModelEdit) -> Tagged:
    """Change a model's description or thresholds; thresholds, which decide what may be served, need the role admin.

    With ``If-Match: "<revision>"`` the edit is refused if somebody else was faster.
    """
    if "thresholds" in body.changes:
        current_principal().require("admin", ("admin",))
    model = services.edit_model(name, body.changes, headers.revision)
    return with_etag(model_out(model, aliases.of_model(model)))


@models.get("/models/<name>/versions")
@require_key("viewer")
@Operation(Page[VersionOut], query=VersionQuery)
def list_versions(name: str, query: VersionQuery) -> dict[str, Any]:
    """Versions of a model, newest first."""
    found = services.find_versions(name, query.before, query.limit + 1)
    serving, known = _serving(), aliases.of_model(services.get_model(name))
    return page(found, query.limit, lambda version: version_out(version, name, known, serving))


@models.get("/models/<name>/versions/<int:number>")
@require_key("viewer")
@Operation(VersionOut)
def show_version(name: str, number: int) -> dict[str, Any]:
    """One version."""
    version = services.get_version(name, _bounded(number))
    return version_out(version, name, aliases.of_model(version.model), _serving())


@models.post("/models/<name>/versions/<int:number>/retire")
@require_key("operator")
@Operation(VersionOut, errors=(Conflict,))
def retire_version(name: str, number: int) -> dict[str, Any]:
    """Never serve a version again; its files may be collected as garbage."""
    version = deployments.retire(name, _bounded(number))
    return version_out(version, name, aliases.of_model(version.model), _serving())


@models.get("/models/<name>/aliases")
@require_key("viewer")
@Operation(AliasesOut)
def list_aliases(name: str) -> dict[str, Any]:
    """What points to which version."""
    return {"data": [alias_out(alias) for alias in aliases.of_model(services.get_model(name))]}


@models.put("/models/<name>/aliases/<alias>")
@require_key("operator")
@Operation(AliasOut, headers=IfMatch, body=AliasIn, errors=(Conflict, PreconditionFailed), sends=ETAG)
def set_alias(name: str, alias: str, headers: IfMatch, body: AliasIn) -> Tagged:
    """Point an alias to a version; production and canary are moved by deployments only."""
    return with_etag(alias_out(aliases.set_own(name, alias, body.version, headers.revision)))


@models.delete("/models/<name>/aliases/<alias>")
@require_key("operator")
@Operation(None, 204, errors=(Conflict,))
def delete_alias(name: str, alias: str) -> Response:
    """Remove an alias."""
    aliases.delete_own(name, alias)
    return Response(status=204)


@models.get("/models/<name>/deployments")
@require_key("viewer")
@Operation(Page[DeploymentOut], query=DeploymentQuery)
def list_deployments(name: str, query: DeploymentQuery) -> dict[str, Any]:
    """The history of what was served, newest first."""
    return page(deployments.history(name, query.before, query.limit + 1), query.limit, deployment_out)


@models.post("/models/<name>/deployments")
@require_key("operator")
@Operation(
    DeploymentOut,
    201,
    also=(202,),
    headers=IfMatch,
    body=DeploymentIn,
    errors=(Conflict, PreconditionFailed),
    sends=LOCATION,
)
def deploy(name: str, headers: IfMatch, body: DeploymentIn) -> Response:
    """Promote, roll back, canary, abort or withdraw; 201 if that is done, 202 if its version has to be loaded first.

    With ``If-Match: "<revision of the production alias>"`` it is refused if somebody else was faster.
    """
    deployment = deployments.deploy(
        name,
        body.kind,
        _serving,
        number=body.version,
        weight=body.weight,
        reason=body.reason,
        force=body.force,
        may_force="admin" in current_principal().scopes,
        warm=_settings().warm,
        revision=headers.revision,
    )
    response = jsonify(deployment_out(deployment))
    response.status_code = 202 if deployment.state == IN_PROGRESS else 201
    response.headers["Location"] = f"/api/v1/models/{name}/deployments/{deployment.id}"
    return response


@models.get("/models/<name>/deployments/<int:deployment_id>")
@require_key("viewer")
@Operation(DeploymentOut)
def show_deployment(name: str, deployment_id: int) -> dict[str, Any]:
    """One deployment."""
    return deployment_out(deployments.get_deployment(name, _bounded(deployment_id)))


@models.get("/models/<name>/evaluations")
@require_key("viewer")
@Operation(Page[EvaluationOut], query=EvaluationQuery)
def list_evaluations(name: str, query: EvaluationQuery) -> dict[str, Any]:
    """What was measured of a model's versions, newest first."""
    found = services.find_evaluations(name, query.version, query.before, query.limit + 1)
    return page(found, query.limit, evaluation_out)


@models.get("/artifacts")
@require_key("viewer")
@Operation(Page[ArtifactOut], query=ArtifactQuery)
def list_artifacts(query: ArtifactQuery) -> dict[str, Any]:
    """What the artifact store holds, by digest, and who needs it."""
    found = needs.find_artifacts(_settings(), query.after, query.limit + 1)
    return page(found, query.limit, lambda used: {**vars(used.artifact), "used_by": used.users})


def _bounded(number: int) -> int:
    """No number of ours is above; a database would refuse what does not fit its column."""
    return min(number, MAX_NUMBER + 1)


def _serving() -> ServingState:
    return serving_state.read(_settings())


def _settings() -> Settings:
    settings: Settings = current_app.config["SETTINGS"]
    return settings
