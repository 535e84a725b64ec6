"""Models and versions as the API shows and takes them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from control_plane.extensions import iso
from control_plane.operations import Out, Time
from control_plane.registry.services import MAX_DESCRIPTION, ModelSummary
from control_plane.registry.serving_state import ModelState, ServingState
from control_plane.registry.tables import Model, Version
from control_plane.requests import FROM_DIGITS, PageQuery, Text

MAX_NUMBER = 10**9 - 1
Number = Annotated[int, Field(ge=1, le=MAX_NUMBER), FROM_DIGITS]


class ModelQuery(PageQuery):
    after: Text | None = Field(None, description="the name of the last model of the page before")
    prefix: Text | None = Field(None, description="how names begin")


class VersionQuery(PageQuery):
    before: Number | None = Field(None, description="the last version of the page before")


class ModelEdit(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    description: str = Field(max_length=MAX_DESCRIPTION)


class ServingOut(Out):
    """The version that is meant to be served, and its state in Triton."""

    version: int
    state: str
    reason: str | None
    message: str | None


class ModelOut(Out):
    name: str
    description: str
    revision: int
    created_by: str
    created_at: Time


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
    serving: ServingOut | None
    created_by: str
    created_at: Time


class SummaryOut(ModelOut):
    num_versions: int
    newest: VersionOut | None
    serving: ServingOut | None


def model_out(model: Model) -> dict[str, Any]:
    return {
        "name": model.name,
        "description": model.description,
        "revision": model.revision,
        "created_by": model.created_by,
        "created_at": iso(model.created_at),
    }


def summary_out(summary: ModelSummary, serving: ServingState) -> dict[str, Any]:
    """``serving`` is the version that is meant to be served, with its state in Triton; None if none is."""
    state = serving.models.get(summary.model.name)
    newest = None if summary.newest is None else version_out(summary.newest, summary.model.name, serving)
    return {
        **model_out(summary.model),
        "num_versions": summary.num_versions,
        "newest": newest,
        "serving": _serving_out(state),
    }


def version_out(version: Version, name: str, serving: ServingState) -> dict[str, Any]:
    """``serving`` is the state of the version in Triton, None if it is not meant to be served."""
    state = serving.models.get(name)
    is_served = state is not None and state.version == version.number
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
        "serving": _serving_out(state) if is_served else None,
        "created_by": version.created_by,
        "created_at": iso(version.created_at),
    }


def _serving_out(state: ModelState | None) -> dict[str, Any] | None:
    if state is None:
        return None
    return {"version": state.version, "state": state.state, "reason": state.reason, "message": state.message}
