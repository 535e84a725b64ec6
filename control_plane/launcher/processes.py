"""Which processes and shared memory files belong to one installation, and how to end them.

Everything that the launcher starts carries ``SUPERVISED_LLMOS_HOME=<LLMOS_HOME>`` in its environment, and so does what
those start in turn; Triton's shared memory files carry a prefix (registry/model_processes.py). So leftovers of a crash
can be told from everybody else's, whatever pid files survived.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

import psutil

from control_plane.registry.model_processes import orphan_stubs, shared_memory_prefix
from control_plane.settings import Settings

MARKER = "SUPERVISED_LLMOS_HOME"
SHARED_MEMORY = Path("/dev/shm")
MAX_LOOKS = 10


def child_environment(settings: Settings) -> dict[str, str]:
    """Environment for everything that the launcher starts: the caller's, every setting spelled out, and the marker."""
    environment = dict(os.environ)
    for setting in fields(settings):
        value = getattr(settings, setting.name)
        environment[setting.metadata["variable"]] = "" if value is None else str(value)
    environment[MARKER] = str(settings.home)
    return environment


def our_processes(settings: Settings) -> list[psutil.Process]:
    """Every living process of this installation but the caller and its ancestors."""
    spared = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    ours = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid not in spared and _is_ours(process, settings):
                ours.append(process)
    return ours


def _is_ours(process: psutil.Process, settings: Settings) -> bool:
    return process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARKER) == str(settings.home)


def end(processes: Iterable[psutil.Process], grace_s: float) -> None:
    """SIGTERM, and after ``grace_s`` SIGKILL for those that are left."""
    processes = list(processes)
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    _, alive = psutil.wait_procs(processes, timeout=grace_s)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(alive, timeout=5)


def remove_shared_memory(settings: Settings) -> None:
    """Delete this installation's files in /dev/shm; to be called when no Triton of ours is running."""
    for path in SHARED_MEMORY.glob(f"{shared_memory_prefix(settings)}*"):
        with contextlib.suppress(OSError):
            path.unlink()


def end_leftovers(settings: Settings, grace_s: float = 10.0) -> int:
    """End every process of this installation, delete its shared memory, and return how many processes there were."""
    num_ended = 0
    # One look can miss a process that is just being started, by a fork or before its exec; it shows at the next look.
    for _ in range(MAX_LOOKS):
        leftovers = our_processes(settings) + orphan_stubs(settings)
        if not leftovers:
            break
        end(leftovers, grace_s)
        num_ended += len(leftovers)
    remove_shared_memory(settings)
    return num_ended
