"""The registry of a whole installation: what `llmos up` installed is known, and a checkpoint is published once."""

from __future__ import annotations

import json

import pytest

from control_plane.artifacts import artifact_store

from .conftest import Stack

pytestmark = pytest.mark.e2e


def test_what_up_installed_is_in_the_registry_with_its_proof_and_its_state(stack: Stack):
    shown = stack.llmos("models", "show", stack.model)
    assert shown.returncode == 0, shown.stderr
    assert "Loaded" in shown.stdout and "tokens compared" in shown.stdout
    (model,) = json.loads(stack.llmos("models", "list", "--prefix", stack.model, "--json").stdout)
    assert (model["num_versions"], model["newest"]["version"], model["newest"]["passed"]) == (1, 1, True)
    assert artifact_store(stack.settings).has(model["newest"]["digest"])


def test_publishing_twice_with_the_same_key_makes_one_version(stack: Stack):
    command = ("publish", str(stack.checkpoint), "published", "--key", "once")
    first, second = stack.llmos(*command), stack.llmos(*command)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    document = json.loads(stack.llmos("models", "show", "published", "--json").stdout)
    (version,) = document["versions"]
    assert (version["version"], version["passed"], version["precision"]) == (1, True, "fp32")
    assert artifact_store(stack.settings).has(version["digest"])
    assert not (stack.settings.jobs_dir / version["job_id"]).exists()


def test_a_model_that_does_not_exist_is_one_line(stack: Stack):
    result = stack.llmos("models", "show", "nothing")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("llmos: model 'nothing' does not exist")
