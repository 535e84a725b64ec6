"""Steps of the jobs that make and check versions. Each runs an exporter as a child and asks first what is there."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from control_plane.artifacts import artifact_store
from control_plane.errors import ControlPlaneError
from control_plane.jobs.kinds import JobParams, JobRun
from control_plane.registry import services
from control_plane.registry.model_directory import NAME, is_sealed
from control_plane.version_facts import read_version_facts
from triton_backend.version_folder import digest

MAX_TEXT = 1000


def _no_nul(text: str) -> str:
    if "\0" in text:
        raise ValueError("expected a text without NUL characters")
    return text


Text = Annotated[str, Field(min_length=1, max_length=MAX_TEXT), AfterValidator(_no_nul)]
ModelName = Annotated[str, Field(pattern=f"^{NAME.pattern}$")]


class ExportParams(JobParams):
    """As ``llmos export``: a checkpoint folder on the worker's machine or the id of a model on the Hub."""

    checkpoint: Text
    name: ModelName
    precision: Literal["fp32", "fp16", "bf16", "int8", "int4"] = "fp32"
    device: Literal["cpu", "cuda"] = "cpu"
    max_model_len: Annotated[int, Field(ge=1)] | None = None
    max_num_seqs: Annotated[int, Field(ge=1)] | None = None
    max_source_len: Annotated[int, Field(ge=1)] | None = None
    lora_slots: Annotated[int, Field(ge=0)] | None = None
    lora_rank: Annotated[int, Field(ge=1)] | None = None
    certify: bool = True


class VerifyParams(JobParams):
    """As ``llmos verify``: run the proof of a version folder again."""

    folder: Text
    checkpoint: Text | None = None


def export(run: JobRun) -> Mapping[str, Any]:
    """Write a version folder below LLMOS_HOME/versions."""
    return _export(run, run.settings.versions_dir / run.params.name / run.job_id)


def build(run: JobRun) -> Mapping[str, Any]:
    """Publish: export into the job's own folder, which ends with the job."""
    return {name: value for name, value in _export(run, _built(run)).items() if name != "folder"}


def store(run: JobRun) -> Mapping[str, Any]:
    """Publish: put what was built into the artifact store."""
    return {"digest": artifact_store(run.settings).put(_built(run))}


def register(run: JobRun) -> Mapping[str, Any]:
    """Publish: make it the next version of its model."""
    version = services.register(run.params.name, _built(run), job_id=run.job_id, actor=run.actor)
    return {"model": run.params.name, "version": version.number, "passed": version.passed}


def verify_version(run: JobRun) -> Mapping[str, Any]:
    params: VerifyParams = run.params
    options = [] if params.checkpoint is None else [f"--checkpoint={params.checkpoint}"]
    finished = run.child("exporters.verify", *options, "--", params.folder, good_statuses=(0, 3))
    if finished is None:
        raise ControlPlaneError("the proof ended without saying what it found")
    return {"passed": finished.fields["passed"]}


def _export(run: JobRun, out: Path) -> Mapping[str, Any]:
    """A complete folder of this job is kept."""
    params: ExportParams = run.params
    if not is_sealed(out):
        # What a killed attempt left is either sealed or rubbish.
        shutil.rmtree(out, ignore_errors=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        given = params.model_dump(exclude={"checkpoint", "certify"}, exclude_none=True)
        options = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
        options += [] if params.certify else ["--no-certify"]
        run.child("exporters", *options, "--", params.checkpoint, str(out), good_statuses=(0, 3))
    return {"folder": str(out), "digest": digest(out), "passed": read_version_facts(out).passed}


def _built(run: JobRun) -> Path:
    return run.folder / "version"
