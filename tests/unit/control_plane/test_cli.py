"""The command line's manners: one line for a mistake, exit codes, and nothing slow imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from control_plane.settings import PROJECT_ROOT

pytestmark = pytest.mark.unit


def llmos(home: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LLMOS_")}
    environment |= {"LLMOS_HOME": str(home), "LLMOS_MODEL_REPOSITORY": str(home / "models"), **variables}
    command = [sys.executable, "-m", "control_plane.cli", *arguments]
    return subprocess.run(command, env=environment, cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=60)


def test_help_names_every_command(tmp_path: Path) -> None:
    shown = llmos(tmp_path, "--help").stdout
    for command in (
        "up",
        "down",
        "status",
        "logs",
        "export",
        "verify",
        "generate",
        "keys",
        "users",
        "audit",
        "jobs",
        "models",
        "publish",
        "evaluate",
        "import",
        "artifacts",
        "gc",
        "system",
    ):
        assert command in shown


def test_wrong_usage_is_2(tmp_path: Path) -> None:
    assert llmos(tmp_path, "generate").returncode == 2
    assert llmos(tmp_path, "nosuch").returncode == 2


def test_bad_setting_is_one_line_and_1(tmp_path: Path) -> None:
    result = llmos(tmp_path, "status", LLMOS_WEB_PORT="many")
    assert result.returncode == 1
    assert result.stderr == "llmos: LLMOS_WEB_PORT has value 'many'; expected a port from 1 to 65535.\n"


def test_nothing_running_is_said_and_1(tmp_path: Path) -> None:
    result = llmos(tmp_path, "status")
    assert (result.returncode, result.stdout) == (1, f"Nothing is running in {tmp_path}.\n")
    assert llmos(tmp_path, "down").stdout == f"Nothing is running in {tmp_path}.\n"


def test_logs_that_do_not_exist_are_named(tmp_path: Path) -> None:
    result = llmos(tmp_path, "logs", "triton")
    assert (result.returncode, result.stderr) == (1, "llmos: there is no log of 'triton'; there are: none yet\n")


def test_generate_without_a_key_says_where_keys_come_from(tmp_path: Path) -> None:
    result = llmos(tmp_path, "generate", "starter", "Hello")
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1 and "LLMOS_API_KEY" in result.stderr


def test_control_plane_that_is_away_is_one_line(tmp_path: Path) -> None:
    result = llmos(tmp_path, "generate", "starter", "Hello", LLMOS_WEB_PORT="1", LLMOS_API_KEY="llmos_key")
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1 and "127.0.0.1:1" in result.stderr


def test_pytorch_is_never_imported_by_the_launcher() -> None:
    modules = "cli, launcher.startup, launcher.run_triton, reconciler, triton"
    script = "\n".join(f"import control_plane.{name}" for name in modules.split(", "))
    script += "\nimport sys; print(sorted({'torch', 'transformers', 'onnx', 'onnxruntime'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", script], cwd=PROJECT_ROOT, capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stderr
