"""The configuration that supervisord is given."""

from __future__ import annotations

import configparser
import os
import shlex
from pathlib import Path

import pytest

from control_plane.launcher.supervisor import log_path, programs, render_config
from control_plane.settings import Settings
from control_plane.supervision import MAX_SOCKET_PATH_BYTES, SupervisorClient, socket_path

pytestmark = pytest.mark.unit


def settings_in(home: Path, **variables: str) -> Settings:
    return Settings.from_environment({"LLMOS_HOME": str(home), **variables})


def parsed(settings: Settings) -> configparser.RawConfigParser:
    parser = configparser.RawConfigParser()
    parser.read_string(render_config(settings))
    return parser


def test_every_process_is_restarted_for_long_and_stopped_with_its_group(tmp_path: Path) -> None:
    config = parsed(settings_in(tmp_path))
    names = [section.partition(":")[2] for section in config.sections() if section.startswith("program:")]
    assert names == ["redis", "triton", "reconciler", "worker", "worker-heavy", "web"]
    for name in names:
        program = config[f"program:{name}"]
        assert program["autorestart"] == program["killasgroup"] == "true"
        assert program["stopasgroup"] == ("false" if name == "triton" else "true"), "Triton ends its own children"
        assert int(program["startretries"]) >= 1000
        assert program["stdout_logfile"] == str(log_path(settings_in(tmp_path), name))
        assert program["redirect_stderr"] == "true" and int(program["stdout_logfile_maxbytes"]) > 0


def test_what_others_need_starts_first_and_stops_last(tmp_path: Path) -> None:
    priorities = {program.name: program.priority for program in programs(settings_in(tmp_path))}
    assert sorted(priorities, key=lambda name: priorities[name]) == [
        "redis",
        "triton",
        "reconciler",
        "worker",
        "worker-heavy",
        "web",
    ]


def test_redis_elsewhere_is_not_started(tmp_path: Path) -> None:
    names = [program.name for program in programs(settings_in(tmp_path, LLMOS_REDIS_URL="redis://example/0"))]
    assert "redis" not in names


def test_home_with_blanks_and_percent_signs_is_quoted(tmp_path: Path) -> None:
    settings = settings_in(tmp_path / "50 % full")
    command = parsed(settings)["program:redis"]["command"].replace("%%", "%")
    assert shlex.split(command)[1] == str(settings.run_dir / "redis.conf")
    assert "%%" in parsed(settings)["supervisord"]["logfile"]


def test_long_home_gets_a_socket_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    short, long = settings_in(Path("/srv/llmos")), settings_in(tmp_path / ("long" * 30))
    assert socket_path(short) == Path("/srv/llmos/run/supervisor.sock")
    assert len(os.fsencode(socket_path(long))) <= MAX_SOCKET_PATH_BYTES
    assert socket_path(long) != socket_path(settings_in(tmp_path / ("long" * 31)))


def test_client_of_nothing_says_that_nothing_runs(tmp_path: Path) -> None:
    client = SupervisorClient(settings_in(tmp_path))
    assert not client.is_alive()
    assert client.processes() == []
