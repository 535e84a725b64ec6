"""Steps of the job that installs an adapter: a PEFT folder is converted for one version, then put into place."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from control_plane.artifacts import artifact_store
from control_plane.auth import audit
from control_plane.extensions import db
from control_plane.jobs.kinds import JobParams, JobRun
from control_plane.registry import adapters
from control_plane.registry.aliases import of_model
from control_plane.registry.model_directory import find_files, is_sealed
from control_plane.registry.params import ModelName, Text
from control_plane.registry.services import get_model, get_version
from triton_backend.version_folder import digest


class AdapterParams(JobParams):
    """``peft_folder`` lies on the worker's machine; ``version`` is the one it is meant for, production if left out.

    ``other_base``: the adapter may name another base model than the version's.
    """

    model: ModelName
    adapter: Annotated[str, Field(pattern=f"^{adapters.ADAPTER.pattern}$")]
    peft_folder: Text
    version: Annotated[int, Field(ge=1)] | None = None
    other_base: bool = False

    @property
    def scope(self) -> str:
        return "deploy"


def choose(run: JobRun) -> Mapping[str, Any]:
    """Which version it is made for; kept, whatever becomes production meanwhile."""
    params: AdapterParams = run.params
    model = get_model(params.model)
    version = adapters.target_version(model, params.version, of_model(model))
    # As ``needs`` reads it: its files stay until the adapter is made.
    return {"model": params.model, "version": version.number, "digest": version.digest}


def convert(run: JobRun) -> Mapping[str, Any]:
    params: AdapterParams = run.params
    out = run.folder / "adapter"
    if not is_sealed(out):
        shutil.rmtree(out, ignore_errors=True)
        settings, version = run.settings, get_version(params.model, run.results["choose"]["version"])
        repository, store, spare = settings.model_repository, artifact_store(settings), run.folder / "version"
        folder = find_files(repository, store, params.model, version.number, version.digest, spare)
        options = [f"--name={params.adapter}", *(["--other-base"] if params.other_base else [])]
        run.child("exporters.adapters", *options, "--", params.peft_folder, str(folder), str(out))
    return {"digest": digest(out)}


def install(run: JobRun) -> Mapping[str, Any]:
    params: AdapterParams = run.params
    adapters.install_adapter(run.folder / "adapter", run.settings.model_repository, params.model, params.adapter)
    details = {"digest": run.results["convert"]["digest"], "version": run.results["choose"]["version"]}
    audit.record("adapter.install", f"{params.model}/{params.adapter}", run.actor, **details)
    db.session.commit()
    return {"model": params.model, "adapter": params.adapter}
