"""Steps of the jobs that train. Each runs a recipe as a child."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from typing import Any

from pydantic import create_model

from control_plane.jobs.kinds import JobParams, JobRun
from control_plane.registry.params import ModelName
from control_plane.training.config import PretrainConfig

PretrainParams: type[JobParams] = create_model(
    "PretrainParams",
    __base__=JobParams,
    __doc__="The recipe's own settings (training/config.py), and what the checkpoint is called.",
    name=(ModelName, ...),
    **{field.name: (type(field.default), field.default) for field in dataclasses.fields(PretrainConfig)},  # type: ignore[call-overload]
)


def pretrain(run: JobRun) -> Mapping[str, Any]:
    """Train a checkpoint into LLMOS_HOME/checkpoints; a complete one of this job is kept."""
    values = run.params.model_dump()
    out = run.settings.checkpoints_dir / f"{values.pop('name')}-{run.job_id}"
    if not (out / "config.json").is_file():
        shutil.rmtree(out, ignore_errors=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        options = [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]
        run.child("control_plane.training.recipes.pretrain", *options, "--", str(out))
    return {"folder": str(out)}
