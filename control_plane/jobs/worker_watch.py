"""Whether workers really consume their queues, asked again and again: ``LLMOS_HOME/run/workers.json``.

A process can be alive and yet run nothing, so each queue is sent the canary task. The thread that asks (in the process
of the reconciler, which needs neither Redis nor a worker) alone writes the file; the web server reads it.

    {"default": {"answered_at": 1764158400.1, "is_answered": true, "detail": "ran a task in 12 ms"}, "cpu": …, "gpu": …}

A worker that has been silent for a minute, while Redis answers and no job of its queues runs, is started anew.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import structlog
from flask import Flask
from sqlalchemy.exc import SQLAlchemyError

from control_plane.databases import reason_of
from control_plane.errors import ControlPlaneError
from control_plane.extensions import DEFAULT_QUEUE
from control_plane.jobs.services import HEAVY_QUEUES, RedisUnavailable, WorkerUnavailable, ping_worker, running_job
from control_plane.settings import Settings

WORKERS = {"worker": (DEFAULT_QUEUE,), "worker-heavy": HEAVY_QUEUES}
"""The supervised processes that run jobs, with the queues that each consumes."""
PING_INTERVAL_S = 10.0
RETRY_S = 1.0
PING_TIMEOUT_S = 2.0
SILENCE_LIMIT_S = 60.0

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class QueueState:
    """``answered_at`` is the Unix time at which a worker last showed that it consumes the queue, None if none did yet.

    ``detail`` says what it did, or, unless ``is_answered``, why the last question got no answer.
    """

    answered_at: float | None = None
    is_answered: bool = False
    detail: str = "nobody has asked it yet; see the log of the reconciler"


class WorkerWatch:
    """Owned by its thread. ``restart`` is given the name of a supervised process."""

    def __init__(self, app: Flask, restart: Callable[[str], None]) -> None:
        self._app = app
        self._settings: Settings = app.config["SETTINGS"]
        self._restart = restart
        self._states: dict[str, QueueState] = {}
        self._silent_since: dict[str, float] = {}

    def run(self, stopped: threading.Event) -> None:
        while not stopped.is_set():
            try:
                self.look()
            except SQLAlchemyError as error:
                log.warning("workers_not_asked", reason=reason_of(error))
            except Exception:
                # Whatever it was, the next look is seconds away; a thread that ended would never look again.
                log.exception("workers_not_asked")
            is_silent = any(not state.is_answered for state in self._states.values())
            stopped.wait(RETRY_S if is_silent else PING_INTERVAL_S)

    def look(self) -> None:
        """Ask every queue once, write down what was heard, and start silent workers anew."""
        for program, queues in WORKERS.items():
            for queue in queues:
                self._states[queue] = self._ask(queue, queues)
            _write(self._settings, self._states)
            silent_s = max(time.monotonic() - self._silent_since.get(queue, time.monotonic()) for queue in queues)
            if silent_s > SILENCE_LIMIT_S:
                self._start_anew(program, queues, silent_s)

    def _ask(self, queue: str, queues: tuple[str, ...]) -> QueueState:
        # A worker that is busy answers nothing, but renews its lease.
        with self._app.app_context():
            job_id = running_job(queues)
        try:
            if job_id is None:
                ping = ping_worker(self._app.extensions["celery"], PING_TIMEOUT_S, queue)
                detail = f"ran a task in {ping.latency_s * 1000:.0f} ms"
            else:
                detail = f"runs job {job_id[:8]}"
        except WorkerUnavailable as error:
            if isinstance(error, RedisUnavailable):
                self._silent_since.pop(queue, None)
            else:
                self._silent_since.setdefault(queue, time.monotonic())
            return QueueState(self._states.get(queue, QueueState()).answered_at, False, str(error))
        self._silent_since.pop(queue, None)
        return QueueState(time.time(), True, detail)

    def _start_anew(self, program: str, queues: tuple[str, ...], silent_s: float) -> None:
        log.warning("worker_silent", process=program, queues=queues, silent_s=round(silent_s))
        # It gets as long again, and then another start.
        for queue in queues:
            self._silent_since.pop(queue, None)
        try:
            self._restart(program)
        except ControlPlaneError as error:
            log.warning("worker_not_restarted", process=program, reason=str(error))


def read(settings: Settings) -> Mapping[str, QueueState]:
    """The state of every queue, as it was last written; what was written long ago says nothing of now."""
    try:
        found = json.loads(_path(settings).read_text(encoding="utf-8"))
        written = {queue: QueueState(**state) for queue, state in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        written = {}
    return {queue: _as_of_now(written.get(queue, QueueState())) for queues in WORKERS.values() for queue in queues}


def _as_of_now(state: QueueState) -> QueueState:
    age_s = time.time() - (state.answered_at or 0.0)
    if not state.is_answered or age_s <= SILENCE_LIMIT_S:
        return state
    detail = f"it was last asked {age_s:.0f} s ago; see the log of the reconciler"
    return replace(state, is_answered=False, detail=detail)


def _write(settings: Settings, states: Mapping[str, QueueState]) -> None:
    path = _path(settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    document = {queue: asdict(state) for queue, state in states.items()}
    staged.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    staged.rename(path)


def _path(settings: Settings) -> Path:
    return settings.run_dir / "workers.json"
