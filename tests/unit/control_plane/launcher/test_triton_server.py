"""How Triton is started: what it may do, for whom, and with which Python."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from control_plane.launcher import triton_server
from control_plane.launcher.processes import MARKER
from control_plane.secrets import triton_admin_key
from control_plane.settings import PROJECT_ROOT, Settings

pytestmark = pytest.mark.unit


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    folders = {"LLMOS_HOME": str(tmp_path / "home"), "LLMOS_TRITON_DIR": str(tmp_path / "triton")}
    return Settings.from_environment(folders)


def test_triton_listens_on_loopback_only_and_loads_nothing_by_itself(settings: Settings) -> None:
    command = triton_server.command(settings)
    for protocol in ("http", "grpc", "metrics"):
        assert f"--{protocol}-address=127.0.0.1" in command
    assert "--model-control-mode=explicit" in command
    assert "--disable-auto-complete-config" in command


def test_control_apis_need_the_key_and_inference_and_statistics_do_not(settings: Settings) -> None:
    restricted = [part for part in triton_server.command(settings) if "restricted" in part]
    assert len(restricted) == 2
    for option in restricted:
        apis, _, key = option.partition("=")[2].partition(":")
        assert key == f"admin-key={triton_admin_key(settings)}"
        assert "model-repository" in apis and "shared-memory" in apis
        assert "inference" not in apis and "statistics" not in apis


def test_shared_memory_carries_a_prefix_of_its_own_per_installation(tmp_path: Path) -> None:
    prefixes = set()
    for name in ("one", "two"):
        settings = Settings.from_environment({"LLMOS_HOME": str(tmp_path / name)})
        (option,) = (part for part in triton_server.command(settings) if "shm-region-prefix-name" in part)
        prefixes.add(option.rpartition("=")[2])
    assert len(prefixes) == 2 and all(prefix.startswith("llmos-") for prefix in prefixes)


def test_stub_finds_our_packages_and_nobody_elses(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.setenv("PYTHONHOME", "/elsewhere")
    environment = triton_server.environment(settings)
    assert environment["PATH"].split(":")[0] == str(Path(sys.executable).parent)
    assert "PYTHONPATH" not in environment and "PYTHONHOME" not in environment
    assert environment["LD_LIBRARY_PATH"].startswith(str(settings.triton_dir / "lib"))
    assert environment[MARKER] == str(settings.home)


def test_server_of_ones_own_is_linked_and_not_written_to(settings: Settings, tmp_path: Path) -> None:
    server = tmp_path / "opt" / "tritonserver"
    (server / "backends" / "python").mkdir(parents=True)
    (server / "bin").mkdir()
    (server / "bin" / "tritonserver").touch()
    (server / "backends" / "python" / "triton_python_backend_stub").touch()
    before = sorted(server.rglob("*"))
    own = Settings(home=settings.home, triton_dir=settings.triton_dir, triton_bin=server / "bin" / "tritonserver")
    for _ in range(2):
        triton_server.install(own)
        backends = settings.triton_dir / "backends"
        assert (backends / "python").readlink() == server / "backends" / "python"
        assert (backends / "llm" / "model.py").readlink() == PROJECT_ROOT / "triton_backend" / "model.py"
        assert [path.name for path in (backends / "llm").iterdir()] == ["model.py"]
    assert sorted(server.rglob("*")) == before
    assert triton_server.command(own)[0] == str(server / "bin" / "tritonserver")
