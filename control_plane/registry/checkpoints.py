"""Checkpoints by name, ``LLMOS_HOME/checkpoints/NAME``, and the steps of the job that imports one.

    folder or Hub id ──fetch──► checked, sealed ──store──► artifact store ──install──► LLMOS_HOME/checkpoints/NAME

What is imported holds no pickle and no code; it is known by its digest, like a version.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from control_plane.artifacts import artifact_store
from control_plane.errors import Conflict, ControlPlaneError
from control_plane.jobs.kinds import JobParams, JobRun
from control_plane.registry.model_directory import NAME
from control_plane.registry.params import ModelName, Text
from control_plane.settings import Settings
from triton_backend.version_folder import MANIFEST_JSON, digest


class ImportParams(JobParams):
    """``source`` is a folder on the worker's machine or the id of a Hub model; ``name`` what it is called here."""

    source: Text
    name: ModelName


def resolve(settings: Settings, given: str) -> str:
    """The folder of an imported or trained checkpoint of that name; anything else, a path or a Hub id, as it is."""
    folder = settings.checkpoints_dir / given
    return str(folder) if NAME.fullmatch(given) and folder.is_dir() else given


def digest_of(folder: Path) -> str | None:
    """None for a checkpoint that was not imported."""
    return digest(folder) if (folder / MANIFEST_JSON).is_file() else None


def fetch(run: JobRun) -> Mapping[str, Any]:
    """Get a checked and sealed copy into the job's own folder; a finished one of this job is kept."""
    params: ImportParams = run.params
    target = run.settings.checkpoints_dir / params.name
    if target.exists() and digest_of(target) is None:
        raise _taken(params.name)
    out = run.folder / "checkpoint"
    if not out.exists():
        # What is downloaded goes with the job; until then a download that broke off goes on where it was.
        hub = {"HF_HUB_CACHE": str(run.folder / "hub")}
        finished = run.child("exporters.fetch", "--", params.source, str(out), environment=hub)
        if finished is None:
            raise ControlPlaneError("the import ended without saying what it found")
    return {"digest": digest(out)}


def store(run: JobRun) -> Mapping[str, Any]:
    artifact_store(run.settings).put(run.folder / "checkpoint", check=lambda: run.pause(0))
    return {}


def install(run: JobRun) -> Mapping[str, Any]:
    """Put it under its name. The name of another checkpoint is not taken over."""
    target, wanted = run.settings.checkpoints_dir / run.params.name, run.results["fetch"]["digest"]
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        artifact_store(run.settings).get(wanted, target)
    elif digest_of(target) != wanted:
        raise _taken(run.params.name)
    return {"checkpoint": run.params.name, "folder": str(target)}


def _taken(name: str) -> Conflict:
    return Conflict(f"there is another checkpoint {name!r} already; import this one under another name")
