"""The operating-system processes behind Triton: the server, and one stub per loaded model.

Triton itself never ends a stub that hangs and never notices one that died; the reconciler does, by process id.

    <stub program> <repository>/<model>/<version>/model.py <shared memory name> <bytes> <bytes> <server pid> …

Stubs of this installation are told from others by their shared memory name, whose prefix the launcher gives to Triton.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path

import psutil

from control_plane.settings import Settings

STUB = "triton_python_backend_stub"
SERVER = "tritonserver"
SERVER_GRACE_S = 5.0


def home_digest(settings: Settings) -> str:
    return hashlib.sha256(str(settings.home).encode()).hexdigest()[:10]


def shared_memory_prefix(settings: Settings) -> str:
    """Name prefix of the files that Triton's Python backend makes in /dev/shm for this installation."""
    return f"llmos-{home_digest(settings)}-"


def server_pid_path(settings: Settings) -> Path:
    return settings.run_dir / "triton.pid"


def server_process(settings: Settings) -> psutil.Process | None:
    """The tritonserver of this installation, if it runs on this machine."""
    with contextlib.suppress(psutil.Error, OSError, ValueError):
        process = psutil.Process(int(server_pid_path(settings).read_text()))
        if process.name() == SERVER:
            return process
    return None


def stub_processes(settings: Settings, name: str | None = None, version: int | None = None) -> Iterator[psutil.Process]:
    """Every stub of this installation, or those of one version of a model."""
    prefix = shared_memory_prefix(settings)
    model_file = None if name is None else str(settings.model_repository / name / str(version) / "model.py")
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            command = process.cmdline()
            if len(command) < 3 or Path(command[0]).name != STUB or not command[2].startswith(prefix):
                continue
            if model_file is None or command[1] == model_file:
                yield process


def orphan_stubs(settings: Settings) -> list[psutil.Process]:
    """Stubs whose server is gone: it was killed before it could end them."""
    orphans = []
    for process in stub_processes(settings):
        with contextlib.suppress(psutil.Error):
            parent = process.parent()
            if parent is None or parent.name() != SERVER:
                orphans.append(process)
    return orphans


def kill_stubs(settings: Settings, name: str, version: int) -> None:
    """End the stubs of one version at once; a hung one would keep its memory after the model is loaded anew."""
    for process in stub_processes(settings, name, version):
        with contextlib.suppress(psutil.Error):
            process.kill()


def kill_server(settings: Settings) -> bool:
    """End Triton at once, if it is found; asked politely, it would first wait for streams that can never end."""
    process = server_process(settings)
    if process is None:
        return False
    with contextlib.suppress(psutil.Error):
        process.kill()
    return True


def end_server(settings: Settings) -> None:
    """End Triton, so that its supervisor starts it anew: SIGTERM, then after a grace SIGKILL."""
    process = server_process(settings)
    if process is None:
        return
    with contextlib.suppress(psutil.Error):
        process.terminate()
        with contextlib.suppress(psutil.TimeoutExpired):
            process.wait(SERVER_GRACE_S)
            return
        process.kill()
