"""Everything that would stop llmos is said at once, with how to mend it."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections import namedtuple
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from control_plane.errors import PreflightError
from control_plane.launcher import libpython, preflight, redis_server
from control_plane.settings import Settings

pytestmark = pytest.mark.unit
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def ports() -> Iterator[list[int]]:
    sockets = [socket.socket() for _ in range(5)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    numbers = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    yield numbers


@pytest.fixture
def environment(tmp_path: Path, ports: list[int]) -> dict[str, str]:
    names = ("WEB", "TRITON_HTTP", "TRITON_GRPC", "TRITON_METRICS", "REDIS")
    return {
        "LLMOS_HOME": str(tmp_path / "home"),
        "LLMOS_MODEL_REPOSITORY": str(tmp_path / "models"),
        "LLMOS_TRITON_DIR": str(tmp_path / "triton"),
        **{f"LLMOS_{name}_PORT": str(port) for name, port in zip(names, ports, strict=True)},
    }


def problems(environment: dict[str, str]) -> list[str]:
    return [str(problem) for problem in preflight.find_problems(Settings.from_environment(environment))]


def test_sound_machine_has_no_problems(environment: dict[str, str]) -> None:
    assert problems(environment) == []


def test_taken_port_names_the_variable_and_its_owner(environment: dict[str, str]) -> None:
    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", int(environment["LLMOS_WEB_PORT"])))
        listener.listen()
        (problem,) = problems(environment)
    assert f"Port {environment['LLMOS_WEB_PORT']} on 127.0.0.1 is taken by process {os.getpid()} (" in problem
    assert "LLMOS_WEB_PORT" in problem.partition(")")[2]


def test_two_settings_with_one_port_are_both_named(environment: dict[str, str]) -> None:
    environment["LLMOS_REDIS_PORT"] = environment["LLMOS_TRITON_HTTP_PORT"]
    found = problems(environment)
    assert [problem.split()[0] for problem in found] == ["LLMOS_TRITON_HTTP_PORT", "LLMOS_REDIS_PORT"]


def test_port_of_a_redis_elsewhere_is_not_asked_for(environment: dict[str, str]) -> None:
    environment["LLMOS_REDIS_URL"] = "redis://example:6379/0"
    assert "LLMOS_REDIS_PORT" not in preflight.ports(Settings.from_environment(environment))


def test_address_that_is_not_ours_is_a_problem(environment: dict[str, str]) -> None:
    environment["LLMOS_HOST"] = "192.0.2.1"
    (problem,) = problems(environment)
    assert "on 192.0.2.1 cannot be used" in problem


def test_every_problem_is_told_at_once(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: object = None) -> Path:
        raise PreflightError("it is missing")

    monkeypatch.setattr(libpython, "provide", missing)
    monkeypatch.setattr(redis_server, "find_binary", missing)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1 << 40, 0, 32 << 20))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: namedtuple("Memory", "available")(1 << 30))
    with pytest.raises(PreflightError) as caught:
        preflight.check(Settings.from_environment(environment))
    lines = str(caught.value).splitlines()
    assert len(lines) == 5
    assert "/dev/shm has 32 MiB free; Triton needs 64. In Docker: --shm-size=1g" in lines[2]
    assert "disk space free; 3.0 are needed" in lines[3] and "LLMOS_HOME" in lines[3]
    assert "1.0 GiB of memory are available; 2 are needed." in lines[4]


def test_other_python_is_named(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 14, 0, "final", 0))
    (problem,) = problems(environment)
    assert problem.startswith("This is Python 3.14; llmos needs 3.11 or 3.12.")


def test_folder_that_cannot_be_made_is_named(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    environment["LLMOS_MODEL_REPOSITORY"] = str(tmp_path / "file" / "models")
    (problem,) = problems(environment)
    assert "cannot be written" in problem and "LLMOS_MODEL_REPOSITORY" in problem


def test_missing_server_of_ones_own_is_named(environment: dict[str, str]) -> None:
    environment["LLMOS_TRITON_BIN"] = "/nowhere/bin/tritonserver"
    assert any("/nowhere/bin/tritonserver does not exist" in problem for problem in problems(environment))


def test_a_database_server_that_does_not_answer_is_named_without_its_password(environment, ports):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # Bound, but nobody listens: refused at once.
        url = f"postgresql://me:secret@127.0.0.1:{silent.getsockname()[1]}/llmos"
        (problem,) = [each for each in problems({**environment, "LLMOS_DATABASE_URL": url}) if "database" in each]
    assert "does not answer" in problem and "mend LLMOS_DATABASE_URL" in problem
    assert "secret" not in problem
