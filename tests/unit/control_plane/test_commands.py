"""What the commands print: with ``--json`` one document and nothing else; log lines of a job only when asked for."""

from __future__ import annotations

import contextlib
import json

import httpx
import pytest
import structlog
from typer.testing import CliRunner

from control_plane import cli, client
from control_plane.commands import jobs, storage

pytestmark = pytest.mark.unit

JOB = {
    "id": "a" * 32,
    "kind": "publish",
    "state": "SUCCEEDED",
    "error": None,
    "result": {"garbage": [], "passed": True},
}
EVENTS = [
    {"id": 1, "event": "step", "step": "export"},
    {"id": 2, "event": "log", "stream": "stderr", "message": "[a warning] of a library"},
]


def run(*arguments: str, exit_code: int = 0) -> str:
    shown = CliRunner().invoke(cli.app, arguments)
    assert shown.exit_code == exit_code, shown.output
    return shown.stdout


@pytest.fixture
def served(app, admin, monkeypatch):
    """Every command talks to the application of the test, as an administrator."""
    key = admin.create_key("cli", "admin")["key"]
    transport = httpx.WSGITransport(app)
    real = client.ControlPlane
    monkeypatch.setattr(client, "ControlPlane", lambda url, key: real("http://llmos", key, transport=transport))
    monkeypatch.setenv("LLMOS_API_KEY", key)
    # The server's log would be printed between.
    with structlog.testing.capture_logs():
        yield admin


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("import /nowhere tiny --no-wait", {"kind": "import", "state": "QUEUED"}),
        ("publish tiny chat --no-wait", {"kind": "publish"}),
        ("evaluate starter --suite certificate --no-wait", {"kind": "evaluate"}),
        ("jobs submit pretrain name=tiny --no-wait", {"kind": "pretrain"}),
        ("adapters add starter /nowhere/poet --no-wait", {"kind": "adapter"}),
        ("models alias starter stable 3", {"name": "starter"}),
        ("models threshold starter certificate.passed --min 1", {"name": "starter"}),
        ("keys create laptop --role viewer", {"name": "laptop", "role": "viewer"}),
    ],
)
def test_with_json_a_command_prints_one_document(served, command, expected):
    assert json.loads(run(*command.split(), "--json")).items() >= expected.items()


def test_what_was_changed_stands_in_the_document(served, settings):
    stable = json.loads(run("models", "alias", "starter", "stable", "3", "--json"))["aliases"]
    assert {"stable": 3}.items() <= {alias["name"]: alias["version"] for alias in stable}.items()
    removed = json.loads(run("models", "alias", "starter", "stable", "--json"))["aliases"]
    assert "stable" not in [alias["name"] for alias in removed]
    limited = json.loads(run("models", "threshold", "starter", "certificate.passed", "--min", "1", "--json"))
    assert limited["thresholds"]["certificate.passed"]["min"] == 1
    key = json.loads(run("keys", "create", "laptop", "--json"))
    assert key["key"].startswith("llmos_")
    assert json.loads(run("keys", "revoke", key["prefix"], "--json"))["state"] == "revoked"
    job = served.submit_job("pretrain", {"name": "tiny"})
    assert json.loads(run("jobs", "cancel", job["id"], "--json"))["state"] == "CANCELLED"
    (settings.model_repository / "starter" / "adapters" / "poet").mkdir(parents=True)
    assert json.loads(run("adapters", "remove", "starter", "poet", "--json")) == []


def test_a_retired_version_is_a_document(served):
    run("withdraw", "starter", "--json")
    assert json.loads(run("retire", "starter", "3", "--json"))["retired_at"]


class EndedJob:
    """A control plane with one job, which ends at once; ``state`` is how."""

    def __init__(self, state: str = "SUCCEEDED") -> None:
        self._job = {**JOB, "state": state}

    def job(self, job_id: str) -> dict:
        return self._job

    def retry_job(self, job_id: str) -> dict:
        return self._job

    def collect_garbage(self, dry_run: bool) -> dict:
        return self._job

    def last_event_id(self, job_id: str) -> int:
        return 0

    def follow_job(self, job_id: str, after: int) -> list[dict]:
        return EVENTS


@pytest.mark.parametrize("command", ["jobs watch JOB", "jobs retry JOB", "gc"])
@pytest.mark.parametrize(("state", "exit_code"), [("SUCCEEDED", 0), ("FAILED", 1)])
def test_with_json_a_job_that_is_followed_is_printed_as_it_ended(monkeypatch, command, state, exit_code):
    for module in (jobs, storage):
        monkeypatch.setattr(module, "connected", lambda: contextlib.nullcontext(EndedJob(state)))
    assert json.loads(run(*command.split(), "--json", exit_code=exit_code)) == {**JOB, "state": state}


def test_log_lines_of_a_job_are_shown_when_asked_for(monkeypatch):
    monkeypatch.setattr(jobs, "connected", lambda: contextlib.nullcontext(EndedJob()))
    assert "    [a warning] of a library\n" in run("jobs", "watch", "JOB", "--log")
    plain = run("jobs", "watch", "JOB")
    assert "    export\n" in plain and "warning" not in plain
