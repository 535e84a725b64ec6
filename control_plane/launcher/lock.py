"""One ``llmos up`` per LLMOS_HOME: a locked file that says who starts or runs this installation.

The lock is the kernel's (flock), so it is gone with its holder, however that ended. A foreground ``llmos up`` holds it
until it stops; ``--detach`` gives it back once everything runs, and then a living supervisord with ``detached`` in the
file means "running". What lives without either is a leftover of a crash.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from control_plane.errors import ControlPlaneError
from control_plane.settings import Settings


class AlreadyRunning(ControlPlaneError):
    """Somebody else holds the lock."""

    code = "already_running"


@dataclass(frozen=True)
class Launch:
    """Who started the installation. ``detached`` is True once a detached start is complete."""

    pid: int
    detached: bool = False


@contextmanager
def launch_lock(settings: Settings) -> Iterator[None]:
    """Hold the lock; raises AlreadyRunning at once if another process does."""
    path = _path(settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise AlreadyRunning(f"llmos is already running in {settings.home}") from None
    try:
        yield
    finally:
        os.close(descriptor)


def is_held(settings: Settings) -> bool:
    """Whether an ``llmos up`` of this installation is alive."""
    try:
        with launch_lock(settings):
            return False
    except AlreadyRunning:
        return True


def write_launch(settings: Settings, launch: Launch) -> None:
    """Note who holds the lock. Written in place: another file of that name would not be the locked one."""
    _path(settings).write_text(json.dumps(asdict(launch)) + "\n", encoding="utf-8")


def read_launch(settings: Settings) -> Launch | None:
    try:
        return Launch(**json.loads(_path(settings).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _path(settings: Settings) -> Path:
    return settings.run_dir / "llmos.lock"
