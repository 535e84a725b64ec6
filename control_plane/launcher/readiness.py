"""Waits until everything that was started really answers, and names the culprit with its log if something does not.

Asked from outside, as a client would: Redis by PING, the web server over HTTP, the worker over its queue, Triton and
the model by what the reconciler's probes found.
"""

from __future__ import annotations

import http.client
import subprocess
import time
from collections.abc import Callable

from control_plane.errors import ControlPlaneError
from control_plane.launcher import redis_server
from control_plane.launcher.console import Screen
from control_plane.launcher.supervisor import log_path
from control_plane.registry import serving_state
from control_plane.registry.serving_state import FAILED_TO_LOAD, LOADED, LOADING
from control_plane.settings import Settings
from control_plane.supervision import SupervisorClient

POLL_S = 0.2
CRASH_LOOP_S = 8.0
"""A process that has not stayed up for this long will not do so by waiting."""
TIMEOUT_S = 180.0
LOG_LINES = 15


class NotReady(ControlPlaneError):
    code = "not_ready"


def wait_until_ready(
    settings: Settings,
    model: str | None,
    supervisord: subprocess.Popen[bytes],
    screen: Screen,
    timeout_s: float = TIMEOUT_S,
    *,
    may_fail: bool = False,
) -> bool:
    """Return when all parts answer, and ``model``, if any; raises NotReady with the end of the culprit's log.

    A model that ``may_fail`` to load is no reason to stop: its repair needs everything else. Returns whether it is
    loaded; how long a load may take, the reconciler decides.
    """
    waiting = _checks(settings, model)
    watch = _CrashWatch(settings)
    started_at = time.monotonic()
    with screen.step("start everything") as show:
        while waiting:
            for name in [name for name, is_ready in waiting.items() if is_ready()]:
                del waiting[name]
                screen.done(f"{name} answers", started_at)
            show("waiting for " + ", ".join(waiting))
            if supervisord.poll() is not None:
                raise _failure(settings, "supervisord", "ended")
            watch.check()
            state = None if model is None else serving_state.read(settings).models.get(model)
            if state is not None and state.state == FAILED_TO_LOAD and waiting:
                if not may_fail:
                    raise _failure(settings, "triton", f"could not load {model}: {state.message}")
                if set(waiting) == {f"model {model}"}:
                    screen.line(f"model {model} cannot be loaded: {state.message}")
                    return False
            is_loading = state is not None and state.state == LOADING
            if time.monotonic() - started_at > timeout_s and not is_loading:
                late = next(iter(waiting))
                culprit = late if late in watch.names else "triton"
                raise _failure(settings, culprit, f"is not ready after {timeout_s:g} s ({late})")
            time.sleep(POLL_S if waiting else 0)
    return model is not None


def _checks(settings: Settings, model: str | None) -> dict[str, Callable[[], bool]]:
    def model_is_loaded() -> bool:
        state = serving_state.read(settings).models.get(model or "")
        return state is not None and state.state == LOADED

    checks: dict[str, Callable[[], bool]] = {
        "triton": lambda: serving_state.read(settings).triton_is_reachable,
        **({} if model is None else {f"model {model}": model_is_loaded}),
        "web": lambda: _web_is_live(settings),
        "worker": lambda: redis_server.is_ready(settings) and _worker_answers(settings),
    }
    return {"redis": lambda: redis_server.is_ready(settings), **checks} if settings.starts_redis else checks


def _web_is_live(settings: Settings) -> bool:
    host = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else settings.host
    connection = http.client.HTTPConnection(host, settings.web_port, timeout=2)
    try:
        connection.request("GET", "/health/live")
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _worker_answers(settings: Settings) -> bool:
    import redis
    from kombu.exceptions import KombuError

    from control_plane.extensions import create_celery

    try:
        return bool(create_celery(settings).control.ping(timeout=0.5, limit=1))
    except (OSError, KombuError, redis.RedisError):
        return False


class _CrashWatch:
    """Notices processes that end again and again."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._client = SupervisorClient(settings)
        self._down_since: dict[str, float] = {}
        self.names: set[str] = set()

    def check(self) -> None:
        now = time.monotonic()
        for process in self._client.processes():
            self.names.add(process.name)
            if process.is_running:
                self._down_since.pop(process.name, None)
            elif process.state in ("BACKOFF", "FATAL", "EXITED"):
                self._down_since.setdefault(process.name, now)
            if now - self._down_since.get(process.name, now) > CRASH_LOOP_S:
                raise _failure(self._settings, process.name, "ends as soon as it is started")


def _failure(settings: Settings, name: str, what: str) -> NotReady:
    path = log_path(settings, name)
    lines = tail(settings, name, LOG_LINES)
    return NotReady("\n".join([f"{name} {what}. The end of {path}:", *(f"  {line}" for line in lines)]))


def tail(settings: Settings, name: str, num_lines: int) -> list[str]:
    """The last lines of a process's log."""
    try:
        with log_path(settings, name).open("rb") as stream:
            stream.seek(max(0, stream.seek(0, 2) - 64 * 1024))
            return stream.read().decode("utf-8", errors="replace").splitlines()[-num_lines:]
    except OSError:
        return []
