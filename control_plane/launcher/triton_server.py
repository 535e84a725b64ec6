"""Installs Triton Inference Server and knows how it is started: its folders, command line and environment.

The server comes out of a wheel, without Docker and without root; ``LLMOS_TRITON_BIN`` names another one, NVIDIA's
container for example. Either way Triton is given a backend directory of ours, so nothing is written into a foreign one:

    LLMOS_TRITON_DIR/
      nvidia_pytriton-0.7.0/      the wheel, unpacked (absent with LLMOS_TRITON_BIN)
      lib/<python release>/       libpython, see libpython.py
      backends/
        python ->                 the server's own Python backend, with the stub for the running Python
        llm/model.py ->           triton_backend/model.py; the rest is imported as a package from the environment
"""

from __future__ import annotations

import filecmp
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from control_plane.errors import PreflightError
from control_plane.launcher import libpython
from control_plane.launcher.processes import child_environment
from control_plane.registry.model_processes import shared_memory_prefix
from control_plane.secrets import triton_admin_key
from control_plane.settings import PROJECT_ROOT, Settings

RELEASE = "0.7.0"
WHEEL = f"nvidia-pytriton=={RELEASE}"
BACKEND = "llm"
EXIT_TIMEOUT_S = 10
"""How long requests that run when the server is stopped may go on."""
STUB_MEMORY_BYTES = 8 << 20
STUB_MEMORY_GROWTH_BYTES = 4 << 20
# Everything but health, metadata, model configuration, statistics and inference. Applications need no key; load
# generators ask for statistics, and /metrics tells the same to everybody.
RESTRICTED_APIS = "model-repository,shared-memory,logging,trace"


@dataclass(frozen=True)
class TritonInstallation:
    """Where the parts of one server lie."""

    binary: Path
    python_backend: Path
    backends: Path

    @property
    def stub(self) -> Path:
        """The program that Triton starts for each model; it embeds Python."""
        return self.python_backend / "triton_python_backend_stub"

    @classmethod
    def of(cls, settings: Settings) -> TritonInstallation:
        if settings.triton_bin is not None:
            server = settings.triton_bin.parent.parent
            return cls(settings.triton_bin, server / "backends" / "python", settings.triton_dir / "backends")
        server = _unpacked(settings) / "pytriton" / "tritonserver"
        return cls(server / "bin" / "tritonserver", server / "backends" / "python", settings.triton_dir / "backends")


def is_installed(settings: Settings) -> bool:
    return TritonInstallation.of(settings).binary.exists()


def install(settings: Settings) -> None:
    """Bring the server, libpython, the stub and our backend in place, as far as missing. Raises PreflightError."""
    triton = TritonInstallation.of(settings)
    if settings.triton_bin is None:
        if not triton.binary.exists():
            _unpack_wheel(_unpacked(settings))
        _put_stub_in_place(triton)
    for path in (triton.binary, triton.stub):
        if not path.exists():
            raise PreflightError(f"{path} does not exist; LLMOS_TRITON_BIN must be <server>/bin/tritonserver.")
    if settings.triton_bin is None:
        libpython.provide(settings)
    (triton.backends / BACKEND).mkdir(parents=True, exist_ok=True)
    _link(triton.backends / "python", triton.python_backend)
    _link(triton.backends / BACKEND / "model.py", PROJECT_ROOT / "triton_backend" / "model.py")


def missing_libraries(settings: Settings) -> list[str]:
    """Shared libraries that the stub would not find. With one missing, a model would stay LOADING for ever."""
    stub = TritonInstallation.of(settings).stub
    result = subprocess.run(["ldd", stub], capture_output=True, text=True, env=environment(settings))
    return [line.split()[0] for line in result.stdout.splitlines() if line.endswith("not found")]


def command(settings: Settings) -> list[str]:
    """Command line of the server. It holds the admin key, so other users of the machine can see it in ``ps``."""
    triton = TritonInstallation.of(settings)
    restricted = f"{RESTRICTED_APIS}:admin-key={triton_admin_key(settings)}"
    return [
        str(triton.binary),
        f"--backend-directory={triton.backends}",
        f"--model-repository={settings.model_repository}",
        "--model-control-mode=explicit",
        "--disable-auto-complete-config",
        "--http-address=127.0.0.1",
        f"--http-port={settings.triton_http_port}",
        f"--http-restricted-api={restricted}",
        "--grpc-address=127.0.0.1",
        f"--grpc-port={settings.triton_grpc_port}",
        f"--grpc-restricted-protocol={restricted}",
        "--metrics-address=127.0.0.1",
        f"--metrics-port={settings.triton_metrics_port}",
        f"--exit-timeout-secs={EXIT_TIMEOUT_S}",
        # The key is "python" for every Python-based backend.
        f"--backend-config=python,shm-region-prefix-name={shared_memory_prefix(settings)}",
        f"--backend-config=python,shm-default-byte-size={STUB_MEMORY_BYTES}",
        f"--backend-config=python,shm-growth-byte-size={STUB_MEMORY_GROWTH_BYTES}",
    ]


def environment(settings: Settings) -> dict[str, str]:
    """Environment of the server.

    The stub ignores PYTHONPATH and finds its packages through the first ``python3`` on PATH: ours. Threads of the
    engine are set in model.json, so PyTorch's own pool, used for small tensors only, is kept to one.
    """
    variables = child_environment(settings)
    for name in ("PYTHONHOME", "PYTHONPATH"):
        variables.pop(name, None)
    variables["PATH"] = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '/usr/bin:/bin')}"
    libraries = [str(libpython.library_folder(settings)), os.environ.get("LD_LIBRARY_PATH", "")]
    variables["LD_LIBRARY_PATH"] = ":".join(filter(None, libraries))
    variables.setdefault("OMP_NUM_THREADS", "1")
    return variables


def _unpacked(settings: Settings) -> Path:
    return settings.triton_dir / f"nvidia_pytriton-{RELEASE}"


def _unpack_wheel(target: Path) -> None:
    """Let pip unpack the wheel beside ``target`` and rename it into place when it is complete."""
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = target.with_name(f"{target.name}.partial-{os.getpid()}")
    try:
        # No dependencies: the wheel's own Python package is not used, and its pins would not fit ours.
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(staged), WHEEL]
        if subprocess.run([*pip, "--progress-bar", "on"], env={**os.environ, "PIP_QUIET": "0"}).returncode != 0:
            raise PreflightError(f"pip could not install {WHEEL}; its message is above. Start again when mended.")
        staged.rename(target)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _put_stub_in_place(triton: TritonInstallation) -> None:
    """Copy the stub of the running Python beside the backend, where its run path finds NVIDIA's libraries."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    source = triton.python_backend.parent.parent / "python_backend_stubs" / version / triton.stub.name
    if not source.exists():
        raise PreflightError(f"{WHEEL} has no stub for Python {version}; use Python 3.11 or 3.12.")
    if not triton.stub.exists() or not filecmp.cmp(source, triton.stub):
        staged = triton.stub.with_name(f"{triton.stub.name}.{os.getpid()}")
        shutil.copy2(source, staged)
        staged.rename(triton.stub)


def _link(path: Path, target: Path) -> None:
    """Make ``path`` a symbolic link to ``target``, replacing another link in one step."""
    if path.is_symlink() and Path(os.readlink(path)) == target:
        return
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    staged.unlink(missing_ok=True)
    staged.symlink_to(target)
    staged.rename(path)
