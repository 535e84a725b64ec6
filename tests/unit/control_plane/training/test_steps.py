"""The job that trains: what its name may be, and what its result says."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from control_plane.registry.checkpoints import resolve
from control_plane.settings import Settings
from control_plane.subprocesses import ChildEvent
from control_plane.training.steps import PretrainParams, pretrain

pytestmark = pytest.mark.unit


@pytest.fixture
def run(tmp_path) -> Any:
    """A job whose child does what it should, at once."""

    def child(module: str, *arguments: str) -> ChildEvent:
        out = run.settings.checkpoints_dir / f"{run.params.name}-{run.job_id}"
        assert arguments[-1] == str(out)
        out.mkdir()
        (out / "config.json").touch()
        return ChildEvent("finished", {"folder": str(out), "num_steps": 7, "perplexity": 12.5, "seconds": 1.0})

    settings = Settings.from_environment({"LLMOS_HOME": str(tmp_path)})
    params = PretrainParams(name="n" * 31)  # type: ignore[call-arg]
    run = SimpleNamespace(params=params, job_id="a" * 32, settings=settings, child=child)
    return run


def test_result_says_how_far_training_came(run: Any) -> None:
    folder = str(run.settings.checkpoints_dir / f"{'n' * 31}-{'a' * 32}")
    assert pretrain(run) == {"folder": folder, "num_steps": 7, "perplexity": 12.5}
    assert pretrain(run) == {"folder": folder}


def test_checkpoint_with_the_longest_name_is_found_by_it(run: Any) -> None:
    folder = str(pretrain(run)["folder"])
    assert resolve(run.settings, folder.rsplit("/", 1)[1]) == folder


def test_name_that_is_too_long_for_a_checkpoint_is_refused() -> None:
    with pytest.raises(ValidationError, match="expected a name of at most 31 characters"):
        PretrainParams(name="n" * 32)  # type: ignore[call-arg]
