"""Steps of the jobs that make and check versions. Each runs an exporter as a child and asks first what is there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from control_plane.artifacts import artifact_store
from control_plane.errors import BadRequest, Conflict, ControlPlaneError
from control_plane.extensions import db
from control_plane.jobs.kinds import JobParams, JobRun
from control_plane.registry import checkpoints, deployments, services, serving_state
from control_plane.registry.model_directory import is_sealed
from control_plane.registry.params import ModelName, SettingName, Text
from control_plane.registry.tables import IN_PROGRESS, UP_TO_DATE
from control_plane.version_facts import read_version_facts
from triton_backend.version_folder import digest

POLL_S = 0.5
CERTIFICATE = "certificate"


class ExportParams(JobParams):
    """As ``llmos export``: a checkpoint's name here, its folder on the worker's machine, or its id on the Hub.

    ``engine`` maps settings of the version's engine to their values.
    """

    checkpoint: Text
    name: ModelName
    precision: Literal["fp32", "fp16", "bf16", "int8", "int4"] = "fp32"
    device: Literal["cpu", "cuda"] = "cpu"
    max_model_len: Annotated[int, Field(ge=1)] | None = None
    max_num_seqs: Annotated[int, Field(ge=1)] | None = None
    max_source_len: Annotated[int, Field(ge=1)] | None = None
    lora_slots: Annotated[int, Field(ge=0)] | None = None
    lora_rank: Annotated[int, Field(ge=1)] | None = None
    engine: dict[SettingName, bool | int | str] = Field(default_factory=dict)
    certify: bool = True

    @property
    def needs_gpu(self) -> bool:
        return self.device == "cuda"


EXPORT_OPTIONS = ExportParams.model_fields.keys() - {"checkpoint", "engine", "certify"}


class PublishParams(ExportParams):
    """``evaluate`` maps suites to the file that each reads, null for the certificate's own. ``deploy`` says what
    becomes of the version in the end; ``weight`` is the canary's share of the requests in percent.
    """

    evaluate: dict[Literal["perplexity", "exact-match", "certificate"], Text | None] = Field(default_factory=dict)
    deploy: Literal["none", "canary", "promote"] = "none"
    weight: Annotated[float, Field(ge=0, le=100)] | None = None

    @property
    def scope(self) -> str:
        return "jobs" if self.deploy == "none" else "deploy"

    @model_validator(mode="after")
    def _is_complete(self) -> PublishParams:
        for suite, path in self.evaluate.items():
            if (path is None) != (suite == CERTIFICATE):
                raise ValueError(
                    f"evaluate.{suite} has value {path!r}; expected a file to read, null for {CERTIFICATE}"
                )
        if (self.weight is not None) != (self.deploy == "canary"):
            raise ValueError("weight is the canary's percentage of requests: expected with deploy 'canary' only")
        return self


class VerifyParams(JobParams):
    """As ``llmos verify``: run the proof of a version folder again."""

    folder: Text
    checkpoint: Text | None = None


def export(run: JobRun) -> Mapping[str, Any]:
    """Write a version folder below LLMOS_HOME/versions."""
    return _export(run, run.settings.versions_dir / run.params.name / run.job_id)


def build(run: JobRun) -> Mapping[str, Any]:
    """Publish: export into the job's own folder, which ends with the job."""
    missing = [path for path in run.params.evaluate.values() if path is not None and not Path(path).is_file()]
    if missing:
        raise BadRequest(f"evaluate names {missing[0]!r}, which is no file on this machine; nothing was exported")
    return {name: value for name, value in _export(run, built_folder(run)).items() if name != "folder"}


def store(run: JobRun) -> Mapping[str, Any]:
    """Publish: put what was built into the artifact store."""
    return {"digest": artifact_store(run.settings).put(built_folder(run), check=lambda: run.pause(0))}


def register(run: JobRun) -> Mapping[str, Any]:
    """Publish: make it the next version of its model."""
    version = services.register(run.params.name, built_folder(run), job_id=run.job_id, actor=run.actor)
    return {"model": run.params.name, "version": version.number, "passed": version.passed}


def deploy(run: JobRun) -> Mapping[str, Any]:
    """Publish: have the version served, as its submitter, and wait until it is. A job makes one deployment, ever."""
    params, number = run.params, run.results["register"]["version"]
    if params.deploy == "none":
        return {}
    deployment = deployments.find_of_job(run.job_id) or deployments.deploy(
        params.name,
        params.deploy,
        lambda: serving_state.read(run.settings),
        number=number,
        weight=params.weight,
        job_id=run.job_id,
        warm=run.settings.warm,
        actor=run.actor,
    )
    while deployment.state == IN_PROGRESS:
        # The reconciler loads the version and ends the deployment, or gives it up if the job is cancelled meanwhile.
        # Nobody waits for it inside a transaction.
        db.session.rollback()
        run.pause(POLL_S)
        db.session.refresh(deployment)
    if deployment.state != UP_TO_DATE:
        why = deployment.failure_message or "another deployment came before it"
        raise Conflict(
            f"version {number} of {params.name!r} is published, but {params.deploy} is {deployment.state}: {why}; when "
            f"that is mended, llmos {params.deploy} {params.name} {number}"
        )
    return {"deployment": deployment.id, "deployed": params.deploy}


def verify_version(run: JobRun) -> Mapping[str, Any]:
    params: VerifyParams = run.params
    given = params.checkpoint and checkpoints.resolve(run.settings, params.checkpoint)
    options = [] if given is None else [f"--checkpoint={given}"]
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
        given = params.model_dump(include=EXPORT_OPTIONS, exclude_none=True)
        options = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
        options += [f"--engine={name}={json.dumps(value)}" for name, value in params.engine.items()]
        options += [] if params.certify else ["--no-certify"]
        checkpoint = checkpoints.resolve(run.settings, params.checkpoint)
        run.child("exporters", *options, "--", checkpoint, str(out), good_statuses=(0, 3))
    return {"folder": str(out), "digest": digest(out), "passed": read_version_facts(out).passed}


def built_folder(run: JobRun) -> Path:
    """Publish: where the version is built, in the job's own folder."""
    return run.folder / "version"
