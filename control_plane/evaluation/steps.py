"""Steps of the job that evaluates a version: find it, measure it in a child process, record what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from control_plane.artifacts import artifact_store
from control_plane.errors import Conflict, ControlPlaneError, ModelNotReady, Unauthorized
from control_plane.extensions import db
from control_plane.jobs.kinds import JobParams, JobRun
from control_plane.registry import serving_state
from control_plane.registry.model_directory import find_files
from control_plane.registry.params import ModelName, Text
from control_plane.registry.services import record_evaluation, recorded_evaluation, resolve_version
from control_plane.registry.serving_state import LOADED
from control_plane.registry.steps import CERTIFICATE, PublishParams, built_folder
from control_plane.secrets import local_api_key
from control_plane.subprocesses import ChildEvent

LM_EVAL = "lm-eval"
MAX_FILES = 100
API_KEY = "LLMOS_API_KEY"
SHOWN_DIGITS = 12


class EvaluateParams(JobParams):
    """``version`` is a number or an alias, the newest if left out. ``data`` are files on the worker's machine: one to
    read, or for lm-eval its task files. ``limit`` is how much of it is read: tokens, pairs or documents.
    """

    name: ModelName
    version: Annotated[int, Field(ge=1)] | Text | None = None
    suite: Literal["perplexity", "exact-match", "certificate", "lm-eval"]
    data: Text | Annotated[list[Text], Field(min_length=1, max_length=MAX_FILES)] | None = None
    limit: Annotated[int, Field(ge=1)] | None = None

    @property
    def files(self) -> list[str]:
        return [self.data] if isinstance(self.data, str) else self.data or []

    @model_validator(mode="after")
    def _has_what_the_suite_reads(self) -> EvaluateParams:
        if self.suite == CERTIFICATE:
            if self.files or self.limit is not None:
                raise ValueError("certificate reads the version's own proof; leave data and limit out")
        elif not self.files:
            raise ValueError(f"{self.suite} needs data; expected the path of a file")
        elif self.suite != LM_EVAL and len(self.files) > 1:
            raise ValueError(f"{self.suite} reads one file; data has {len(self.files)}")
        return self


def find(run: JobRun) -> Mapping[str, Any]:
    """Which version is meant. Decided once: an alias may move while the job waits to be run again."""
    params: EvaluateParams = run.params
    version = resolve_version(params.name, params.version)
    if version.retired_at is not None:
        raise Conflict(f"version {version.number} of {params.name!r} is retired; evaluate another one")
    return {"model": params.name, "version": version.number, "digest": version.digest}


def evaluate(run: JobRun) -> Mapping[str, Any]:
    """Measure the version that was found."""
    params: EvaluateParams = run.params
    if params.suite == LM_EVAL:
        return _ask_endpoint(run)
    return measure(run, _folder(run), params.suite, params.files, params.limit)


def record(run: JobRun) -> Mapping[str, Any]:
    found, measured = run.results["find"], run.results["evaluate"]
    evaluation = record_evaluation(
        run.params.name,
        found["version"],
        run.params.suite,
        measured["metrics"],
        data=measured["data"],
        job_id=run.job_id,
        actor=run.actor,
    )
    return {"evaluation": evaluation.id}


def evaluate_published(run: JobRun) -> Mapping[str, Any]:
    """Publish: measure what was built with every suite that was asked for, and record each before the next."""
    params: PublishParams = run.params
    for suite, path in params.evaluate.items():
        if recorded_evaluation(run.job_id, suite) is None:
            db.session.rollback()
            measured = measure(run, built_folder(run), suite, [] if path is None else [path])
            number, metrics, data = run.results["register"]["version"], measured["metrics"], measured["data"]
            record_evaluation(params.name, number, suite, metrics, data=data, job_id=run.job_id, actor=run.actor)
    return {}


def measure(run: JobRun, folder: Path, suite: str, files: list[str], limit: int | None = None) -> dict[str, Any]:
    """Run a suite that needs no server on a version folder: its metrics, and what data they rest on."""
    options = [f"--suite={suite}", *(f"--data={path}" for path in files)]
    options += [] if limit is None else [f"--limit={limit}"]
    finished = run.child("exporters.evaluate", *options, "--", str(folder))
    return _measured(finished, limit)


def _ask_endpoint(run: JobRun) -> dict[str, Any]:
    """Have lm-eval ask this installation for the version, which must be loaded."""
    name, number = run.params.name, run.results["find"]["version"]
    found = serving_state.read(run.settings).where(name, number)
    if found is None or found[1].state != LOADED:
        raise ModelNotReady(
            f"version {number} of {name!r} is not loaded, and lm-eval asks what is served; load it without requests "
            f"with llmos canary {name} {number} --weight 0, then run this again"
        )
    key = local_api_key(run.settings)
    if key is None:
        raise Unauthorized(f"{run.settings.home} has no API key of its own; llmos up makes one")
    tasks = [f"--task={path}" for path in run.params.files]
    limit = [] if run.params.limit is None else [f"--limit={run.params.limit}"]
    finished = run.child(
        "control_plane.evaluation.lm_eval",
        f"--url={run.settings.web_url}",
        f"--model={name}@{number}",
        f"--version={_folder(run)}",
        *tasks,
        *limit,
        environment={API_KEY: key},
    )
    return _measured(finished, run.params.limit)


def _folder(run: JobRun) -> Path:
    """Where the version lies: installed, or else fetched into the job's folder."""
    found, settings = run.results["find"], run.settings
    repository, store, spare = settings.model_repository, artifact_store(settings), run.folder / "version"
    return find_files(repository, store, found["model"], found["version"], found["digest"], spare)


def _measured(finished: ChildEvent | None, limit: int | None) -> dict[str, Any]:
    if finished is None:
        raise ControlPlaneError("the evaluation ended without saying what it found")
    found = finished.fields
    numbers = {name: float(value) for name, value in found["metrics"].items() if value is not None}
    # JSON has no NaN, which lm-eval gives as the error of a single document.
    metrics = {name: value for name, value in numbers.items() if math.isfinite(value)}
    return {"metrics": metrics, "counts": found["counts"], "data": _data(found["data"], limit)}


def _data(data: Mapping[str, Any] | list[Mapping[str, Any]] | None, limit: int | None) -> str | None:
    """What was read, for people: path and first digits of the sha256 of every file."""
    if not data:
        return None
    files = [data] if isinstance(data, Mapping) else [file for task in data for file in task["files"]]
    shown = [f"{file['path']} sha256:{file['sha256'][:SHOWN_DIGITS]}" for file in files]
    return ", ".join(shown) + ("" if limit is None else f", the first {limit}")
