"""``python -m control_plane.launcher.run_triton``: becomes tritonserver, after clearing away what a crashed one left.

A server killed with SIGKILL can leave model processes and shared memory behind; the supervisor starts this wrapper only
when the previous server is gone, so whatever carries this installation's prefix then is an orphan. The pid is written
down for the reconciler and stays the same after ``exec``.
"""

from __future__ import annotations

import os

from control_plane.launcher import processes, triton_server
from control_plane.registry import model_processes
from control_plane.settings import Settings


def main() -> None:
    settings = Settings.from_environment()
    orphans = model_processes.orphan_stubs(settings)
    processes.end(orphans, grace_s=0)
    processes.remove_shared_memory(settings)
    if orphans:
        print(f"ended {len(orphans)} model processes that a previous server had left behind", flush=True)
    settings.run_dir.mkdir(parents=True, exist_ok=True)
    model_processes.server_pid_path(settings).write_text(f"{os.getpid()}\n")
    command = triton_server.command(settings)
    os.execve(command[0], command, triton_server.environment(settings))


if __name__ == "__main__":
    main()
