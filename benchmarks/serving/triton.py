"""A real Triton that serves one exported version, started for a turn of the benchmark and ended after it.

It is the server, the backend folder and the model directory of an installation, under a home and ports of its own.
``LLMOS_TRITON_DIR`` and ``LLMOS_TRITON_BIN`` say where Triton lies, as they do for ``llmos up``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from benchmarks.bench import Failed
from control_plane.errors import ControlPlaneError
from control_plane.launcher import processes, triton_server
from control_plane.registry import model_directory, model_processes
from control_plane.secrets import triton_admin_key
from control_plane.settings import PROJECT_ROOT, Settings
from control_plane.triton import TritonClient
from triton_backend import version_folder
from triton_backend.config import VersionConfig

MODEL = "bench"
VERSION = 1
START_TIMEOUT_S = 60
KEPT = ("LLMOS_TRITON_DIR", "LLMOS_TRITON_BIN")
PORTS = ("TRITON_HTTP", "TRITON_GRPC", "TRITON_METRICS")


class Triton:
    """A Triton with ``version`` as its one model; ``engine`` are settings of model.json that differ from the export."""

    def __init__(self, version: Path, home: Path, **engine: Any) -> None:
        self.home = home
        self._settings = settings_in(home)
        try:
            triton_server.install(self._settings)
        except ControlPlaneError as error:
            raise Failed(f"Triton cannot be installed: {error}") from error
        _install(version, self._settings.model_repository, engine)

    @property
    def grpc_url(self) -> str:
        return self._settings.triton_grpc_url

    @contextlib.contextmanager
    def running(self) -> Iterator[Triton]:
        """Start the server, load the model, and take everything down again; raises Failed with the log's last line."""
        log = self.home / "triton.log"
        with log.open("wb") as stream:
            server = subprocess.Popen(
                [sys.executable, "-m", "control_plane.launcher.run_triton"],
                cwd=PROJECT_ROOT,
                env=processes.child_environment(self._settings),
                stdout=stream,
                stderr=subprocess.STDOUT,
            )
        client = TritonClient(self.grpc_url, triton_admin_key(self._settings))
        try:
            client.wait_live(START_TIMEOUT_S)
            client.load(MODEL)
            yield self
        except ControlPlaneError as error:
            raise Failed(f"Triton did not serve the model: {error} (see {log})") from error
        finally:
            client.close()
            server.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(2 * triton_server.EXIT_TIMEOUT_S)
            processes.end_leftovers(self._settings)
            server.wait()

    def stub(self) -> psutil.Process:
        """The process in which the engine runs."""
        return next(model_processes.stub_processes(self._settings, MODEL, VERSION))

    def gauge(self, name: str) -> float:
        """A number of Triton's metrics endpoint, such as ``vllm:num_requests_running``."""
        url = f"http://127.0.0.1:{self._settings.triton_metrics_port}/metrics"
        with urllib.request.urlopen(url, timeout=10) as reply:
            lines = reply.read().decode().splitlines()
        return next(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{name}{{"))


def settings_in(home: Path) -> Settings:
    environment = {name: os.environ[name] for name in KEPT if os.environ.get(name)}
    environment |= {"LLMOS_HOME": str(home), "LLMOS_MODEL_REPOSITORY": str(home / "model_repository")}
    environment |= {f"LLMOS_{name}_PORT": str(port) for name, port in zip(PORTS, _free_ports(), strict=True)}
    return Settings.from_environment(environment)


def _free_ports() -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in PORTS]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _install(version: Path, repository: Path, engine: dict[str, Any]) -> None:
    """Copy a version into the model repository with other engine settings, and seal the copy."""
    target = repository / MODEL / str(VERSION)
    shutil.copytree(version, target)
    config = VersionConfig.read(target)
    dataclasses.replace(config, engine=dataclasses.replace(config.engine, **engine)).write(target)
    manifest = version_folder.read_manifest(target)
    (target / version_folder.MANIFEST_JSON).unlink()
    version_folder.seal(target, manifest["source"], manifest["environment"])
    model_directory.write_config(repository, MODEL, [VERSION])
