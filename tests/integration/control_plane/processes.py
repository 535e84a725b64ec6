"""Real processes for tests, each on a port of its own, and waiting for what they do."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import redis
import sqlalchemy

from control_plane.launcher import redis_server
from control_plane.settings import PROJECT_ROOT, Settings


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_for(is_true: Callable[[], object], timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline, f"{what} did not happen within {timeout_s:g} s"
        time.sleep(0.05)


def lock(connection: sqlalchemy.Connection, table: str) -> None:
    """Keep everybody else from writing to ``table`` until this transaction ends."""
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    else:
        connection.exec_driver_sql(f"LOCK TABLE {table} IN EXCLUSIVE MODE")


class Process:
    """A child process with its output in a file; ended, and killed if need be, by ``stop``."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path) -> None:
        self.log = log
        with log.open("ab") as stream:
            self._child = subprocess.Popen(
                command, env=environment, stdout=stream, stderr=stream, cwd=PROJECT_ROOT, start_new_session=True
            )

    def signal(self, number: int) -> None:
        self._child.send_signal(number)

    def kill(self) -> None:
        """As the kernel does it; afterwards the process is gone."""
        self._child.kill()
        self._child.wait()

    def stop(self) -> None:
        self._child.terminate()
        try:
            self._child.wait(10)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()


class Redis:
    """A Redis server that can be stopped and started again on the same port."""

    def __init__(self, settings: Settings, environment: dict[str, str], folder: Path) -> None:
        self._settings, self._environment, self._folder = settings, environment, folder
        self.start()

    def start(self) -> None:
        binary = str(redis_server.find_binary())
        command = [binary, "--port", str(self._settings.redis_port), "--bind", "127.0.0.1", "--save", ""]
        self._process = Process([*command, "--dir", str(self._folder)], self._environment, self._folder / "redis.log")
        wait_for(self._answers, 10, "start of Redis")

    def stop(self) -> None:
        self._process.stop()

    def _answers(self) -> bool:
        try:
            with redis.Redis.from_url(self._settings.redis_url) as client:
                return bool(client.ping())
        except redis.RedisError:
            return False


@contextmanager
def web_server(environment: dict[str, str], port: int, log: Path) -> Iterator[str]:
    """A gunicorn with the application of slow_app.py, by its URL."""
    command = [sys.executable, "-m", "gunicorn", "tests.integration.control_plane.slow_app:app"]
    options = ["--worker-class=gthread", "--workers=1", "--threads=16", f"--bind=127.0.0.1:{port}"]
    process = Process([*command, *options], environment, log)
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        try:
            return httpx.get(f"{url}/health/live").status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False

    wait_for(answers, 30, "start of gunicorn")
    yield url
    process.stop()
