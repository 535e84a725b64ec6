"""Jobs of a whole installation: the command line, a real export, a worker that is killed in the middle of it."""

from __future__ import annotations

import json
import signal
import time

import psutil
import pytest

from control_plane.supervision import SupervisorClient
from triton_backend.version_folder import verify

from .conftest import Stack, wait_for

pytestmark = pytest.mark.e2e


def worker_pid(stack: Stack) -> int:
    return next(p.pid for p in SupervisorClient(stack.settings).processes() if p.name == "worker-heavy")


def job(stack: Stack, job_id: str) -> dict:
    return json.loads(stack.llmos("jobs", "show", job_id, "--json").stdout)


def test_an_export_survives_the_death_of_its_worker_and_its_version_is_made_once(stack):
    parameters = (f"checkpoint={stack.checkpoint}", "name=survivor")
    submitted = stack.llmos("jobs", "submit", "export", *parameters, "--no-wait")
    assert submitted.returncode == 0, submitted.stderr
    job_id = submitted.stdout.strip()

    def is_tracing() -> bool:
        return any(child.cmdline()[2:3] == ["exporters"] for child in psutil.Process(worker_pid(stack)).children())

    wait_for(is_tracing, 30, "start of the exporter")
    time.sleep(1)
    killed = psutil.Process(worker_pid(stack))
    (exporter,) = killed.children()
    killed.send_signal(signal.SIGKILL)
    wait_for(lambda: not exporter.is_running(), 5, "end of the exporter")
    watched = stack.llmos("jobs", "watch", job_id)
    assert watched.returncode == 0, watched.stdout + watched.stderr
    found = job(stack, job_id)
    assert (found["state"], found["attempt"], found["result"]["passed"]) == ("SUCCEEDED", 2, True)
    folders = list((stack.settings.versions_dir / "survivor").iterdir())
    assert [str(folder) for folder in folders] == [found["result"]["folder"]]
    verify(folders[0])


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
