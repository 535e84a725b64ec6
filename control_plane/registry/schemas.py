"""Models, versions, aliases and deployments as the API shows and takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from control_plane.extensions import iso
from control_plane.operations import Out, Time
from control_plane.registry.deployments import MAX_REASON
from control_plane.registry.services import MAX_DESCRIPTION, ModelSummary
from control_plane.registry.serving_state import STANDBY, ServingState
from control_plane.registry.tables import PRODUCTION, Alias, Deployment, Evaluation, Model, Version
from control_plane.requests import FROM_DIGITS, FROM_JSON, WITHOUT_NUL, PageQuery, Text

MAX_NUMBER = 10**9 - 1
MAX_THRESHOLDS = 100
METRIC = r"^[A-Za-z0-9_][A-Za-z0-9_./-]{0,99}\.[A-Za-z0-9_][A-Za-z0-9_,/-]{0,99}$"
Number = Annotated[int, Field(ge=1, le=MAX_NUMBER), FROM_DIGITS]
VersionNumber = Annotated[int, Field(ge=1, le=MAX_NUMBER), FROM_JSON]
Kind = Literal["promote", "rollback", "canary", "abort", "withdraw"]


class ModelQuery(PageQuery):
    after: Text | None = Field(None, description="the name of the last model of the page before")
    prefix: Text | None = Field(None, description="how names begin")


class VersionQuery(PageQuery):
    before: Number | None = Field(None, description="the last version of the page before")


class DeploymentQuery(PageQuery):
    before: Number | None = Field(None, description="the id of the last one of the page before")


class EvaluationQuery(DeploymentQuery):
    version: Number | None = Field(None, description="of this version only")


class ArtifactQuery(PageQuery):
    after: Text | None = Field(None, description="the digest of the last artifact of the page before")


class Limits(BaseModel):
    """What a metric must reach: at least ``min``, at most ``max``."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    min: float | None = None
    max: float | None = None

    @model_validator(mode="after")
    def _has_a_limit(self) -> Limits:
        if self.min is None and self.max is None:
            raise ValueError("expected 'min' or 'max'")
        return self


class ModelEdit(BaseModel):
    """What is left out stays as it is. ``thresholds`` are limits by ``suite.metric``; a version below is not served."""

    model_config = ConfigDict(extra="forbid", strict=True)

    description: Annotated[str, Field(max_length=MAX_DESCRIPTION, pattern=WITHOUT_NUL)] | None = None
    thresholds: (
        Annotated[dict[Annotated[str, Field(pattern=METRIC)], Limits], Field(max_length=MAX_THRESHOLDS)] | None
    ) = None

    @model_validator(mode="after")
    def _changes_something(self) -> ModelEdit:
        if not self.changes:
            raise ValueError("expected 'description' or 'thresholds'")
        return self

    @property
    def changes(self) -> dict[str, Any]:
        return self.model_dump(exclude_none=True)


class DeploymentIn(BaseModel):
    """``version`` may be left out for a rollback, the endings, and for another weight of the canary there is."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    kind: Kind
    version: VersionNumber | None = None
    weight: Annotated[float, Field(ge=0, le=100)] | None = None
    reason: Annotated[str, Field(max_length=MAX_REASON, pattern=WITHOUT_NUL)] | None = None
    force: bool = False


class AliasIn(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    version: VersionNumber


class AliasOut(Out):
    name: str
    version: int
    weight: float | None = Field(description="the canary's share of the requests in percent")
    revision: int
    updated_at: Time


class AliasesOut(Out):
    data: list[AliasOut]


class ModelOut(Out):
    name: str
    description: str
    thresholds: dict[str, Limits]
    aliases: list[AliasOut]
    revision: int
    created_by: str
    created_at: Time


class ServingOut(Out):
    """A version's state in Triton: Standby, Pending, Loading, Loaded or FailedToLoad."""

    state: str
    place: str | None
    reason: str | None
    message: str | None


class ProductionOut(ServingOut):
    version: int


class VersionOut(Out):
    model: str
    version: int
    digest: str
    architecture: str | None
    precision: str | None
    size_bytes: int | None
    passed: bool | None = Field(description="the certificate's verdict")
    certificate: dict[str, Any]
    source: dict[str, Any]
    job_id: str | None
    aliases: list[str]
    serving: ServingOut
    warm_until: Time | None
    retired_at: Time | None
    created_by: str
    created_at: Time


class SummaryOut(ModelOut):
    num_versions: int
    newest: VersionOut | None
    serving: ProductionOut | None = Field(description="the production version")


class FailureOut(Out):
    reason: str | None
    message: str | None


class DeploymentOut(Out):
    """``state`` is InProgress, UpToDate, BlockedByFailedLoad or Superseded."""

    id: int
    model: str
    kind: Kind
    alias: str
    version: int
    previous_version: int | None
    weight: float | None
    state: str
    failure: FailureOut | None = Field(description="why it is blocked")
    reason: str | None
    job_id: str | None
    overridden: list[str] = Field(description="what the gate found when it was forced")
    created_by: str
    created_at: Time
    finished_at: Time | None


class EvaluationOut(Out):
    id: int
    version: int
    suite: str
    metrics: dict[str, float]
    data: str | None
    job_id: str | None
    created_by: str
    created_at: Time


class ArtifactOut(Out):
    """``kind`` is version, checkpoint or damaged."""

    digest: str
    kind: str
    size_bytes: int
    used_by: list[str] = Field(description="versions, checkpoints and jobs that need it; nobody's is garbage")


def model_out(model: Model, aliases: Sequence[Alias]) -> dict[str, Any]:
    return {
        "name": model.name,
        "description": model.description,
        "thresholds": model.thresholds,
        "aliases": [alias_out(alias) for alias in aliases],
        "revision": model.revision,
        "created_by": model.created_by,
        "created_at": iso(model.created_at),
    }


def alias_out(alias: Alias) -> dict[str, Any]:
    return {
        "name": alias.name,
        "version": alias.version.number,
        "weight": alias.weight,
        "revision": alias.revision,
        "updated_at": iso(alias.updated_at),
    }


def summary_out(summary: ModelSummary, aliases: Sequence[Alias], serving: ServingState) -> dict[str, Any]:
    """``serving`` is the production version with its state; None if there is none."""
    name = summary.model.name
    production = next((alias.version.number for alias in aliases if alias.name == PRODUCTION), None)
    newest = None if summary.newest is None else version_out(summary.newest, name, aliases, serving)
    return {
        **model_out(summary.model, aliases),
        "num_versions": summary.num_versions,
        "newest": newest,
        "serving": None if production is None else {"version": production, **_serving_out(name, production, serving)},
    }


def version_out(version: Version, name: str, aliases: Sequence[Alias], serving: ServingState) -> dict[str, Any]:
    """``serving`` is its state in Triton; of the model's ``aliases`` those that point to it are shown."""
    return {
        "model": name,
        "version": version.number,
        "digest": version.digest,
        "architecture": version.architecture,
        "precision": version.precision,
        "size_bytes": version.size_bytes,
        "passed": version.passed,
        "certificate": version.certificate,
        "source": version.source,
        "job_id": version.job_id,
        "aliases": [alias.name for alias in aliases if alias.version_id == version.id],
        "serving": _serving_out(name, version.number, serving),
        "warm_until": iso(version.warm_until),
        "retired_at": iso(version.retired_at),
        "created_by": version.created_by,
        "created_at": iso(version.created_at),
    }


def deployment_out(deployment: Deployment) -> dict[str, Any]:
    failure = {"reason": deployment.failure_reason, "message": deployment.failure_message}
    previous = deployment.previous_version
    return {
        "id": deployment.id,
        "model": deployment.model.name,
        "kind": deployment.kind,
        "alias": deployment.alias,
        "version": deployment.version.number,
        "previous_version": None if previous is None else previous.number,
        "weight": deployment.weight,
        "state": deployment.state,
        "failure": failure if deployment.failure_reason or deployment.failure_message else None,
        "reason": deployment.reason,
        "job_id": deployment.job_id,
        "overridden": deployment.overridden,
        "created_by": deployment.created_by,
        "created_at": iso(deployment.created_at),
        "finished_at": iso(deployment.finished_at),
    }


def evaluation_out(evaluation: Evaluation) -> dict[str, Any]:
    return {
        "id": evaluation.id,
        "version": evaluation.version.number,
        "suite": evaluation.suite,
        "metrics": evaluation.metrics,
        "data": evaluation.data,
        "job_id": evaluation.job_id,
        "created_by": evaluation.created_by,
        "created_at": iso(evaluation.created_at),
    }


def _serving_out(name: str, number: int, serving: ServingState) -> dict[str, Any]:
    found = serving.where(name, number)
    if found is None:
        return {"state": STANDBY, "place": None, "reason": None, "message": None}
    place, state = found
    return {"state": state.state, "place": str(place), "reason": state.reason, "message": state.message}
