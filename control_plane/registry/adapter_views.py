"""Routes of a model's adapters under /api/v1: parse, one service call, render."""

from __future__ import annotations

from typing import Annotated, Any

from apiflask import APIBlueprint
from flask import Response, current_app
from pydantic import BaseModel, ConfigDict, Field

from control_plane.auth import audit
from control_plane.auth.services import require_key
from control_plane.errors import Conflict, ControlPlaneError
from control_plane.extensions import db
from control_plane.jobs import services as jobs
from control_plane.jobs.schemas import JobOut
from control_plane.jobs.tables import Job
from control_plane.operations import Operation, Out
from control_plane.registry import adapters, services
from control_plane.registry.aliases import of_model
from control_plane.registry.schemas import VersionNumber
from control_plane.requests import WITHOUT_NUL
from control_plane.settings import Settings

adapter_routes = APIBlueprint("adapters", __name__, url_prefix="/api/v1")
MAX_PATH = 1000


class AdapterIn(BaseModel):
    """``version`` is the one it is meant for, production if left out."""

    model_config = ConfigDict(extra="forbid", strict=True)

    peft_folder: Annotated[str, Field(min_length=1, max_length=MAX_PATH, pattern=WITHOUT_NUL)] = Field(
        description="a folder on the server, as PEFT's save_pretrained writes it"
    )
    version: VersionNumber | None = None
    other_base: bool = Field(False, description="accept an adapter that names another base model")


class AdapterOut(Out):
    name: str
    size_bytes: int
    digest: str | None
    rank: int | None
    base_digest: str | None = Field(description="digest of the version that it fits")
    version: int | None = Field(description="that version's number; null if it is not registered")
    problem: str | None = Field(description="why it cannot be used")


class AdaptersOut(Out):
    data: list[AdapterOut]


@adapter_routes.get("/models/<name>/adapters")
@require_key("viewer")
@Operation(AdaptersOut)
def list_adapters(name: str) -> dict[str, Any]:
    """LoRA adapters that requests may name, by name."""
    numbers = services.numbers_by_digest(name)
    found = adapters.find_adapters(_settings().model_repository, name)
    return {"data": [{**vars(adapter), "version": numbers.get(adapter.base_digest or "")} for adapter in found]}


@adapter_routes.put("/models/<name>/adapters/<adapter>")
@require_key("operator")
@Operation(JobOut, 202, body=AdapterIn, errors=(Conflict,), sends={"Location": "where the job is shown"})
def put_adapter(name: str, adapter: str, body: AdapterIn) -> tuple[Job, dict[str, str]]:
    """Install an adapter, or replace it, by a job of kind `adapter`."""
    adapters.check_adapter_name(adapter)
    model = services.get_model(name)
    version = adapters.target_version(model, body.version, of_model(model))
    params = {**body.model_dump(), "model": name, "adapter": adapter, "version": version.number}
    job = jobs.submit(current_app.extensions["celery"], current_app.extensions["job_kinds"], "adapter", params)
    return job, {"Location": f"/api/v1/jobs/{job.id}"}


@adapter_routes.delete("/models/<name>/adapters/<adapter>")
@require_key("operator")
@Operation(None, 204)
def delete_adapter(name: str, adapter: str) -> Response:
    """Remove an adapter; requests that run with it go on."""
    services.get_model(name)
    # Written before the folder goes: what is gone must not be gone without a word.
    audit.record("adapter.delete", f"{name}/{adapter}")
    db.session.flush()
    try:
        adapters.remove_adapter(_settings().model_repository, name, adapter)
    except ControlPlaneError:
        db.session.rollback()
        raise
    db.session.commit()
    return Response(status=204)


def _settings() -> Settings:
    settings: Settings = current_app.config["SETTINGS"]
    return settings
