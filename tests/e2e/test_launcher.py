"""Starting and stopping a whole installation, as a person does."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from control_plane.launcher import preflight, processes
from control_plane.registry.model_processes import shared_memory_prefix
from control_plane.settings import PROJECT_ROOT, Settings
from tests.e2e.conftest import LLMOS, MODEL, Stack, llmos, new_environment, wait_for

pytestmark = pytest.mark.e2e


class Installation:
    """An installation with the model of ``stack`` already in its repository."""

    def __init__(self, home: Path, stack: Stack) -> None:
        self.env = new_environment(home)
        self.settings = Settings.from_environment(self.env)
        shutil.copytree(stack.settings.model_repository / MODEL, self.settings.model_repository / MODEL)
        self.output = home / "output.txt"

    def up_in_foreground(self) -> subprocess.Popen[bytes]:
        with self.output.open("wb") as output:
            return subprocess.Popen([*LLMOS, "up"], env=self.env, cwd=PROJECT_ROOT, stdout=output, stderr=output)

    def wait_until_up(self) -> float:
        return wait_for(lambda: "Ctrl-C stops" in self.output.read_text(), 60, f"start:\n{self.output.read_text()}")

    def assert_nothing_is_left(self) -> None:
        assert processes.our_processes(self.settings) == []
        assert list(Path("/dev/shm").glob(f"{shared_memory_prefix(self.settings)}*")) == []
        for variable, (address, port) in preflight.ports(self.settings).items():
            with closing(socket.socket()) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((address, port)), variable


@pytest.fixture
def installation(stack: Stack, tmp_path: Path) -> Iterator[Installation]:
    installation = Installation(tmp_path, stack)
    yield installation
    llmos(installation.env, "down")


def test_first_up_prints_an_answer_the_addresses_and_a_key_once(stack: Stack) -> None:
    assert "The import statement" in stack.up_output
    assert stack.web_url in stack.up_output and stack.http_url in stack.up_output
    assert stack.up_output.count("admin API key") == 1
    assert "base_url=" in stack.up_output and "curl -s" in stack.up_output


def test_second_up_says_that_it_is_running_and_exits_0(stack: Stack) -> None:
    started_at = time.monotonic()
    again = stack.llmos("up")
    assert again.returncode == 0, again.stderr
    assert "already running" in again.stdout and stack.web_url in again.stdout
    assert time.monotonic() - started_at < 5


def test_status_is_0_with_every_process_and_model(stack: Stack) -> None:
    status = stack.llmos("status")
    assert status.returncode == 0, status.stdout
    for name in ("redis", "triton", "web", "worker", "reconciler", MODEL):
        assert name in status.stdout


def test_generate_prints_text_and_names_an_unknown_model(stack: Stack) -> None:
    for mode in ("--stream", "--no-stream"):
        generated = stack.llmos("generate", MODEL, "The import statement", "--max-tokens=8", "--temperature=0", mode)
        assert generated.returncode == 0, generated.stderr
        assert generated.stdout.strip()
    unknown = stack.llmos("generate", "nosuch", "x")
    assert unknown.returncode == 1
    assert "nosuch" in unknown.stderr and "Traceback" not in unknown.stderr


def test_logs_of_one_process_and_of_an_unknown_one(stack: Stack) -> None:
    assert "GRPCInferenceService" in stack.llmos("logs", "triton", "--lines=200").stdout
    unknown = stack.llmos("logs", "nosuch")
    assert unknown.returncode == 1 and "triton" in unknown.stderr


def test_up_with_a_model_is_serving_within_20_s_and_ctrl_c_leaves_nothing(installation: Installation) -> None:
    launcher = installation.up_in_foreground()
    assert installation.wait_until_up() < 20
    assert "train" not in installation.output.read_text()
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(timeout=60) == 0
    installation.assert_nothing_is_left()


def test_down_from_another_terminal_stops_a_start_at_any_moment(installation: Installation) -> None:
    launcher = installation.up_in_foreground()
    wait_for(lambda: processes.our_processes(installation.settings), 30, "a first process")
    assert llmos(installation.env, "down").returncode == 0
    assert launcher.wait(timeout=10) == 0
    installation.assert_nothing_is_left()


def test_up_takes_down_what_a_killed_launcher_left_and_starts_again(installation: Installation) -> None:
    launcher = installation.up_in_foreground()
    installation.wait_until_up()
    launcher.kill()
    launcher.wait()
    left = {process.pid for process in processes.our_processes(installation.settings)}
    assert left, "a killed launcher leaves its supervisor running"
    # The worst case: the supervisor is killed as well, so nobody is there who could be asked.
    os.kill(int((installation.settings.run_dir / "supervisord.pid").read_text()), signal.SIGKILL)
    started = llmos(installation.env, "up", "--detach")
    assert started.returncode == 0, started.stdout + started.stderr
    assert not any(psutil.pid_exists(pid) for pid in left)
    assert llmos(installation.env, "down").returncode == 0
    installation.assert_nothing_is_left()


def test_up_starts_when_every_model_was_withdrawn_and_serves_what_is_promoted_then(installation: Installation) -> None:
    def run(*arguments: str) -> str:
        done = llmos(installation.env, *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("up", "--detach")
    run("withdraw", MODEL)
    run("down")
    assert "No model is served" in run("up", "--detach")
    assert "version 1 is production" in run("promote", MODEL, "1")
    wait_for(lambda: llmos(installation.env, "generate", MODEL, "The").returncode == 0, 30, "an answer")


def test_taken_ports_are_all_named_with_their_owner(installation: Installation) -> None:
    taken = [installation.settings.web_port, installation.settings.triton_grpc_port]
    with closing(socket.socket()) as first, closing(socket.socket()) as second:
        for listener, port in zip((first, second), taken, strict=True):
            listener.bind(("127.0.0.1", port))
            listener.listen()
        refused = llmos(installation.env, "up")
    assert refused.returncode == 1
    for port, variable in zip(taken, ("LLMOS_WEB_PORT", "LLMOS_TRITON_GRPC_PORT"), strict=True):
        assert f"Port {port} on 127.0.0.1 is taken by process {os.getpid()}" in refused.stderr
        assert variable in refused.stderr
    assert "Traceback" not in refused.stderr
    installation.assert_nothing_is_left()
