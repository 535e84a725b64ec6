"""Steps of the jobs that make and check versions. Each runs an exporter as a child and asks first what is there."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from control_plane.errors import ControlPlaneError
from control_plane.jobs.kinds import JobParams, JobRun
from control_plane.registry.model_directory import NAME
from control_plane.version_facts import read_version_facts
from triton_backend.errors import VersionFolderError
from triton_backend.version_folder import digest, verify

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
    """Write a version folder below LLMOS_HOME/versions; a complete one of this job is kept."""
    params: ExportParams = run.params
    out = run.settings.versions_dir / params.name / run.job_id
    if not is_sealed(out):
        # What a killed attempt left is either sealed or rubbish.
        shutil.rmtree(out, ignore_errors=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        given = params.model_dump(exclude={"checkpoint", "certify"}, exclude_none=True)
        options = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
        options += [] if params.certify else ["--no-certify"]
        run.child("exporters", *options, "--", params.checkpoint, str(out), good_statuses=(0, 3))
    return {"folder": str(out), "digest": digest(out), "passed": _verdict(out)}


def verify_version(run: JobRun) -> Mapping[str, Any]:
    params: VerifyParams = run.params
    options = [] if params.checkpoint is None else [f"--checkpoint={params.checkpoint}"]
    finished = run.child("exporters.verify", *options, "--", params.folder, good_statuses=(0, 3))
    if finished is None:
        raise ControlPlaneError("the proof ended without saying what it found")
    return {"passed": finished.fields["passed"]}


def is_sealed(folder: Path) -> bool:
    """Whether a version folder is complete and unchanged."""
    try:
        verify(folder)
    except VersionFolderError:
        return False
    return True


def _verdict(folder: Path) -> bool | None:
    """Of the certificate; None if the version has none."""
    return read_version_facts(folder).passed
