"""Jobs of a whole installation by their commands: evaluate, publish and serve, import, collect garbage."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from control_plane.artifacts import artifact_store
from control_plane.client import ControlPlane

from .conftest import Stack, wait_for
from .test_evaluation import write_task

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def llmos(stack: Stack) -> Iterator[ControlPlane]:
    with ControlPlane(stack.web_url, stack.api_key) as llmos:
        yield llmos


def test_metrics_of_a_served_version_come_from_its_certificate_and_from_lm_eval(
    stack: Stack, llmos: ControlPlane, tmp_path: Path
):
    stack.wait_loaded()
    proof = stack.llmos("evaluate", stack.model, "production", "--suite", "certificate")
    assert proof.returncode == 0, proof.stdout + proof.stderr
    task = write_task(tmp_path, "words", [{"text": "The import", "choices": ["statement", "purple"], "answer": 0}])
    asked = stack.llmos("evaluate", stack.model, "1", "--suite", "lm-eval", task.replace("--task=", "--data="))
    assert asked.returncode == 0, asked.stdout + asked.stderr
    newest, before = llmos.evaluations(stack.model)[:2]
    assert (newest["suite"], newest["version"], newest["metrics"]["words/acc"]) == ("lm-eval", 1, 1.0)
    assert (before["suite"], before["metrics"]["passed"]) == ("certificate", 1.0)
    job = llmos.job(newest["job_id"])
    assert stack.api_key not in json.dumps([job, llmos.job_events(job["id"])])


def test_an_imported_checkpoint_is_published_measured_and_promoted_in_one_job(stack: Stack, llmos: ControlPlane):
    imported = stack.llmos("import", str(stack.checkpoint), "imported")
    assert imported.returncode == 0, imported.stdout + imported.stderr
    command = ("publish", "imported", "oneshot", "--evaluate", "certificate", "--promote")
    published = stack.llmos(*command)
    assert published.returncode == 0, published.stdout + published.stderr
    (version,) = llmos.versions("oneshot")
    assert (version["aliases"], version["serving"]["state"]) == (["production"], "Loaded")
    (deployment,) = llmos.deployments("oneshot")
    assert (deployment["state"], deployment["job_id"]) == ("UpToDate", version["job_id"])
    headers = {"Authorization": f"Bearer {stack.api_key}"}
    body = {"model": "oneshot", "prompt": "The import", "max_tokens": 4}
    answer = httpx.post(f"{stack.web_url}/v1/completions", json=body, headers=headers, timeout=30, trust_env=False)
    assert answer.status_code == 200, answer.text
    assert stack.llmos("withdraw", "oneshot").returncode == 0


def test_garbage_goes_and_what_is_served_stays(stack: Stack, llmos: ControlPlane):
    names = [model["name"] for model in llmos.models()]
    if "oneshot" in names:
        wait_for(lambda: stack.stub_pid("oneshot", 1) is None, 30, "end of the model")
        assert llmos.version("oneshot", 1)["retired_at"] is None
    used = {each["digest"]: each["used_by"] for each in llmos.artifacts()}
    served = llmos.version(stack.model, 1)["digest"]
    assert f"{stack.model}/1" in used[served]
    plan = stack.llmos("gc", "--dry-run")
    assert plan.returncode == 0, plan.stdout + plan.stderr
    collected = stack.llmos("gc")
    assert collected.returncode == 0, collected.stdout + collected.stderr
    if "oneshot" in names:
        assert "oneshot/1" in plan.stdout and not list(stack.settings.model_repository.glob("oneshot*/1"))
        assert artifact_store(stack.settings).has(llmos.version("oneshot", 1)["digest"])
    assert (stack.settings.model_repository / stack.model / "1").is_dir()
    stack.wait_loaded()


def test_the_system_says_who_runs_and_which_queues_they_consume(stack: Stack, llmos: ControlPlane):
    shown = stack.llmos("system")
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert "worker-heavy RUNNING" in shown.stdout and f"{stack.model}/1" in shown.stdout
    found = llmos.system()
    assert {queue for worker in found["workers"]["workers"] for queue in worker["queues"]} == {"default", "cpu", "gpu"}
    assert all(process["state"] == "RUNNING" and process["pid"] for process in found["supervisor"]["processes"])
