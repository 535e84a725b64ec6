"""Jobs of a whole installation: commands, an export whose worker is killed, a publication cancelled at every step."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil
import pytest

from control_plane.client import ControlPlane
from control_plane.supervision import SupervisorClient
from triton_backend.version_folder import verify

from .conftest import Stack, wait_for

pytestmark = pytest.mark.e2e


def pid_of(stack: Stack, program: str) -> int:
    return next(p.pid for p in SupervisorClient(stack.settings).processes() if p.name == program)


def children(stack: Stack, module: str | None = None) -> list[psutil.Process]:
    """Processes of the heavy worker that run ``python -m module``, or anything; one that has just ended is none."""
    found = []
    for child in psutil.Process(pid_of(stack, "worker-heavy")).children():
        with suppress(psutil.NoSuchProcess):  # a zombie is one of these, too
            if module in (None, *child.cmdline()[2:3]):
                found.append(child)
    return found


def job(stack: Stack, job_id: str) -> dict:
    return json.loads(stack.llmos("jobs", "show", job_id, "--json").stdout)


def test_an_export_survives_the_death_of_its_worker_and_its_version_is_made_once(stack):
    parameters = (f"checkpoint={stack.checkpoint}", "name=survivor")
    submitted = stack.llmos("jobs", "submit", "export", *parameters, "--no-wait")
    assert submitted.returncode == 0, submitted.stderr
    job_id = submitted.stdout.strip()

    versions = stack.settings.versions_dir / "survivor"

    def half_made() -> list[Path]:
        return list(versions.glob(f".{job_id}.*/model.onnx*"))

    wait_for(half_made, 60, "a file of the version")
    killed = psutil.Process(pid_of(stack, "worker-heavy"))
    (exporter,) = children(stack, "exporters")
    killed.send_signal(signal.SIGKILL)
    wait_for(lambda: not exporter.is_running(), 5, "end of the exporter")
    assert half_made() and not (versions / job_id).exists()
    watched = stack.llmos("jobs", "watch", job_id)
    assert watched.returncode == 0, watched.stdout + watched.stderr
    found = job(stack, job_id)
    assert (found["state"], found["attempt"], found["result"]["passed"]) == ("SUCCEEDED", 2, True)
    folders = list(versions.iterdir())
    assert [str(folder) for folder in folders] == [found["result"]["folder"]]
    verify(folders[0])


@contextmanager
def halted(stack: Stack, program: str) -> Iterator[None]:
    pid = pid_of(stack, program)
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_a_publication_that_is_cancelled_at_every_step_leaves_nothing_half_made_and_finishes_in_the_end(
    stack: Stack, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("The import statement combines two operations. " * 200)
    with ControlPlane(stack.web_url, stack.api_key) as llmos:
        evaluate = {"perplexity": str(tmp_path / "text.txt")}
        job_id = llmos.publish(str(stack.checkpoint), "halting", evaluate=evaluate, deploy="promote")["id"]
        folder = stack.settings.jobs_dir / job_id

        def cancel() -> None:
            llmos.cancel_job(job_id)
            wait_for(lambda: llmos.job(job_id)["state"] == "CANCELLED", 15, "end of the job")
            assert children(stack) == []

        wait_for(lambda: children(stack, "exporters") and list(folder.glob(".version.*")), 60, "the export")
        cancel()
        assert list(folder.iterdir()) == []
        assert "halting" not in [model["name"] for model in llmos.models()]

        llmos.retry_job(job_id)
        wait_for(lambda: children(stack, "exporters.evaluate"), 60, "the evaluation")
        cancel()
        assert (len(llmos.versions("halting")), llmos.evaluations("halting")) == (1, [])

        with halted(stack, "reconciler"):
            llmos.retry_job(job_id)
            wait_for(lambda: llmos.deployments("halting"), 60, "the deployment")
            cancel()
        wait_for(lambda: llmos.deployments("halting")[0]["state"] == "Superseded", 15, "end of the deployment")
        assert (stack.stub_pid("halting", 1), llmos.model("halting")["aliases"]) == (None, [])

        llmos.retry_job(job_id)
        wait_for(lambda: llmos.job(job_id)["state"] == "SUCCEEDED", 60, "end of the job")
        assert [version["version"] for version in llmos.versions("halting")] == [1]
        assert len(llmos.evaluations("halting")) == 1
        assert [each["state"] for each in llmos.deployments("halting")] == ["UpToDate", "Superseded"]
        llmos.deploy("halting", "withdraw")
        wait_for(lambda: stack.stub_pid("halting", 1) is None, 30, "end of the model")


def test_every_queue_has_a_worker_that_answers(stack: Stack) -> None:
    def queues() -> dict:
        return httpx.get(f"{stack.web_url}/health/ready", timeout=20).json()["queues"]

    wait_for(lambda: all(queue["is_answered"] for queue in queues().values()), 30, "an answer through every queue")
    assert {name for name, queue in queues().items() if queue["answered_s_ago"] < 30} == {"default", "cpu", "gpu"}


def test_a_job_that_fails_says_why_on_one_line_and_in_its_exit_code(stack):
    failed = stack.llmos("jobs", "submit", "verify", "folder=/nonexistent")
    assert failed.returncode == 1
    assert "/nonexistent" in failed.stderr
    assert len(failed.stderr.splitlines()) == 1
    listed = stack.llmos("jobs", "list", "--kind", "verify", "--state", "FAILED")
    assert "verify" in listed.stdout


def test_bad_parameters_are_refused_by_the_command(stack):
    refused = stack.llmos("jobs", "submit", "export", "checkpoint=x", "name=..")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.startswith("llmos: params.name has value '..'")
