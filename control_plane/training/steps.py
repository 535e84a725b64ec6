"""Steps of the jobs that train. Each runs a recipe as a child."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, create_model

from control_plane.jobs.kinds import JobParams, JobRun
from control_plane.registry.params import ModelName
from control_plane.training.config import PretrainConfig

MAX_NAME = 31
"""The job's id is added to it, and the name of a checkpoint has at most 64 characters."""


def _short(name: str) -> str:
    if len(name) > MAX_NAME:
        raise ValueError(f"expected a name of at most {MAX_NAME} characters: the job's id is added to it")
    return name


PretrainParams: type[JobParams] = create_model(
    "PretrainParams",
    __base__=JobParams,
    __doc__="The recipe's own settings (training/config.py), and what the checkpoint is called.",
    name=(Annotated[ModelName, AfterValidator(_short)], ...),
    **{field.name: (type(field.default), field.default) for field in dataclasses.fields(PretrainConfig)},  # type: ignore[call-overload]
)


def pretrain(run: JobRun) -> Mapping[str, Any]:
    """Train a checkpoint into LLMOS_HOME/checkpoints; a complete one of this job is kept."""
    values = run.params.model_dump()
    out = run.settings.checkpoints_dir / f"{values.pop('name')}-{run.job_id}"
    found: dict[str, Any] = {"folder": str(out)}
    if not (out / "config.json").is_file():
        shutil.rmtree(out, ignore_errors=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        options = [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]
        finished = run.child("control_plane.training.recipes.pretrain", *options, "--", str(out))
        if finished is not None:
            found |= {name: finished.fields[name] for name in ("num_steps", "perplexity")}
    return found
