"""The process supervisor of one machine: its configuration and its start; ``control_plane.supervision`` steers it.

supervisord (the ``supervisor`` package) runs Redis, Triton, the web server, the worker and the reconciler, restarts
what ends, with a growing pause when it ends at once, and writes one log file each. Each program leads a process group
that is stopped whole. It is steered over a Unix socket that only its owner may open.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from control_plane.errors import ControlPlaneError
from control_plane.launcher import redis_server
from control_plane.launcher.processes import child_environment
from control_plane.settings import PROJECT_ROOT, Settings
from control_plane.supervision import SupervisorClient, socket_path

LOG_BYTES = 20 << 20
LOG_BACKUPS = 3
START_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Program:
    """One supervised process. Lower ``priority`` starts earlier and stops later.

    SIGTERM goes to its whole group, or, without ``stop_group``, to the process alone, which then ends its children
    itself. SIGKILL, after ``stop_wait_s``, always goes to the group.
    """

    name: str
    command: tuple[str, ...]
    priority: int
    stop_wait_s: int = 10
    stop_group: bool = True


def programs(settings: Settings) -> list[Program]:
    python = sys.executable
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    gunicorn = ("gunicorn", "control_plane.wsgi:app", f"--bind={host}:{settings.web_port}")
    threads = ("--worker-class=gthread", "--workers=1", f"--threads={settings.web_threads}", "--graceful-timeout=10")
    celery = (python, "-m", "celery", "--app=control_plane.worker", "worker", "--pool=threads")
    listed = [
        # A model process that gets a SIGTERM of its own sometimes no longer hears Triton, which then waits for nothing.
        Program("triton", (python, "-m", "control_plane.launcher.run_triton"), 20, stop_wait_s=20, stop_group=False),
        Program("reconciler", (python, "-m", "control_plane.reconciler"), 30),
        # One for what is light, so that it never waits for what is heavy.
        Program("worker", (*celery, "--concurrency=4", "--queues=default", "--hostname=light@%h"), 40, stop_wait_s=15),
        Program("worker-heavy", (*celery, "--concurrency=1", "--queues=cpu,gpu", "--hostname=heavy@%h"), 40, 15),
        Program("web", (python, "-m", *gunicorn, *threads), 50, stop_wait_s=15),
    ]
    if settings.starts_redis:
        redis = (str(redis_server.find_binary()), str(settings.run_dir / "redis.conf"))
        listed.insert(0, Program("redis", redis, 10))
    return listed


def log_path(settings: Settings, name: str) -> Path:
    return settings.logs_dir / f"{name}.log"


def render_config(settings: Settings) -> str:
    sections = [
        f"""\
[supervisord]
logfile={_escape(log_path(settings, "supervisord"))}
logfile_maxbytes={LOG_BYTES}
logfile_backups={LOG_BACKUPS}
pidfile={_escape(settings.run_dir / "supervisord.pid")}
childlogdir={_escape(settings.logs_dir)}
directory={_escape(PROJECT_ROOT)}
nodaemon=true
silent=true

[unix_http_server]
file={_escape(socket_path(settings))}
chmod=0700

[rpcinterface:supervisor]
supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface
"""
    ]
    sections += [_program_section(settings, program) for program in programs(settings)]
    return "\n".join(sections)


def _program_section(settings: Settings, program: Program) -> str:
    # supervisord expands this option twice.
    log = _escape(_escape(log_path(settings, program.name)))
    # The pause before retry n is n seconds, so a thousand retries go on for days.
    return f"""\
[program:{program.name}]
command={_escape(shlex.join(program.command))}
priority={program.priority}
autorestart=true
startsecs=2
startretries=1000
stopasgroup={str(program.stop_group).lower()}
killasgroup=true
stopwaitsecs={program.stop_wait_s}
redirect_stderr=true
stdout_logfile={log}
stdout_logfile_maxbytes={LOG_BYTES}
stdout_logfile_backups={LOG_BACKUPS}
"""


def _escape(value: object) -> str:
    return str(value).replace("%", "%%")


def start(settings: Settings) -> subprocess.Popen[bytes]:
    """Write the configuration and start supervisord in a session of its own; returns when it answers."""
    for folder in (settings.run_dir, settings.logs_dir):
        folder.mkdir(parents=True, exist_ok=True)
    _make_socket_folder(socket_path(settings).parent)
    socket_path(settings).unlink(missing_ok=True)
    config = settings.run_dir / "supervisord.conf"
    config.write_text(render_config(settings), encoding="utf-8")
    (settings.run_dir / "redis.conf").write_text(redis_server.render_config(settings), encoding="utf-8")
    with log_path(settings, "supervisord").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "supervisor.supervisord", "-c", config],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=child_environment(settings),
            cwd=PROJECT_ROOT,
            start_new_session=True,
        )
    client, deadline = SupervisorClient(settings), time.monotonic() + START_TIMEOUT_S
    while not client.is_alive():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise ControlPlaneError(f"supervisord did not start; see {log_path(settings, 'supervisord')}")
        time.sleep(0.05)
    return process


def _make_socket_folder(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    # In a shared temporary folder somebody else may have made it first.
    if folder.stat().st_uid != os.getuid():
        raise ControlPlaneError(f"{folder} belongs to another user; remove it or set XDG_RUNTIME_DIR")
