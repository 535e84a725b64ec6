"""A real supervisord with a real Redis: restarts, shutdown, and finding what a crash left."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from control_plane import supervision
from control_plane.launcher import processes, redis_server, startup, supervisor
from control_plane.launcher.supervisor import Program
from control_plane.registry.model_processes import shared_memory_prefix
from control_plane.settings import Settings
from control_plane.supervision import SupervisorClient

pytestmark = pytest.mark.integration


def wait_for(is_true: Callable[[], object], timeout_s: float = 10) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return Settings.from_environment({"LLMOS_HOME": str(tmp_path / "a % b"), "LLMOS_REDIS_PORT": str(port)})


@pytest.fixture
def supervised(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    """Redis, a process that forks one that ignores SIGTERM, and one that ends at once."""
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    forks = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {stubborn!r}])"
    listed = [
        Program("redis", (str(redis_server.find_binary()), str(settings.run_dir / "redis.conf")), 10),
        Program("forks", (sys.executable, "-c", forks), 20, stop_wait_s=1),
        Program("crashes", (sys.executable, "-c", "print('no such file'); raise SystemExit(3)"), 30),
    ]
    monkeypatch.setattr(supervisor, "programs", lambda _: listed)
    supervisor.start(settings)
    yield settings
    startup.take_down(settings)


def running_processes(settings: Settings) -> Iterator[psutil.Process]:
    """Those that do not end while they are looked at."""
    for process in processes.our_processes(settings):
        with contextlib.suppress(psutil.Error):
            process.cmdline()
            yield process


def state(settings: Settings, name: str) -> str:
    return next(process.state for process in SupervisorClient(settings).processes() if process.name == name)


def test_killed_process_is_started_again(supervised: Settings) -> None:
    wait_for(lambda: redis_server.is_ready(supervised))
    pid = next(p.pid for p in SupervisorClient(supervised).processes() if p.name == "redis")
    wait_for(lambda: state(supervised, "redis") == "RUNNING")
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not psutil.pid_exists(pid))
    wait_for(lambda: redis_server.is_ready(supervised))


def test_process_that_ends_at_once_is_retried_and_its_words_are_logged(supervised: Settings) -> None:
    log = supervisor.log_path(supervised, "crashes")
    wait_for(lambda: state(supervised, "crashes") == "BACKOFF")
    wait_for(lambda: log.read_text().count("no such file") >= 3)


def test_redis_never_drops_a_key_and_writes_nothing(supervised: Settings) -> None:
    import redis

    wait_for(lambda: redis_server.is_ready(supervised))
    client = redis.Redis.from_url(supervised.redis_url)
    assert client.config_get("maxmemory-policy")["maxmemory-policy"] == "noeviction"
    assert client.config_get("save")["save"] == ""
    assert client.config_get("bind")["bind"] == "127.0.0.1"
    client.close()


def test_take_down_ends_every_process_and_its_shared_memory(supervised: Settings) -> None:
    wait_for(lambda: len(processes.our_processes(supervised)) >= 4)
    left = Path("/dev/shm") / f"{shared_memory_prefix(supervised)}test"
    left.touch()
    startup.take_down(supervised)
    assert processes.our_processes(supervised) == []
    assert not left.exists()
    assert not supervision.socket_path(supervised).exists()


def test_processes_whose_supervisor_was_killed_are_found_and_ended(supervised: Settings) -> None:
    # The process that forks and its child; the one that ends at once comes and goes, so a count would say nothing.
    wait_for(lambda: sum("time.sleep(600)" in str(p.cmdline()) for p in running_processes(supervised)) == 2)
    os.kill(SupervisorClient(supervised).pid(), signal.SIGKILL)
    wait_for(lambda: not SupervisorClient(supervised).is_alive())
    assert processes.our_processes(supervised)
    assert processes.end_leftovers(supervised, grace_s=1) >= 3
    assert processes.our_processes(supervised) == []


def test_processes_of_another_installation_are_left_alone(supervised: Settings, tmp_path: Path) -> None:
    other = Settings.from_environment({"LLMOS_HOME": str(tmp_path / "other")})
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    stranger = subprocess.Popen(command, env=processes.child_environment(other))
    try:
        startup.take_down(supervised)
        assert stranger.poll() is None
        assert [process.pid for process in processes.our_processes(other)] == [stranger.pid]
    finally:
        stranger.kill()
        stranger.wait()


def test_children_read_the_settings_that_their_parent_had(settings: Settings) -> None:
    assert Settings.from_environment(processes.child_environment(settings)) == settings
