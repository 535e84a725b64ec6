"""What is running and how well: models by a one-token probe, processes by asking each of them.

``SystemStatus`` owns the answers of the last moments, so that many readers cost one probe. Every question runs at the
same time as the others and has a time limit: the slowest answers for itself only.
"""

from __future__ import annotations

import importlib.metadata
import platform
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import redis
import sqlalchemy
import structlog
from flask import Flask

from control_plane.databases import reason_of
from control_plane.errors import ControlPlaneError, ModelNotReady, NotFound, RequestTimeout
from control_plane.extensions import db
from control_plane.jobs import worker_watch
from control_plane.jobs.worker_watch import QueueState
from control_plane.registry import serving_state
from control_plane.registry.model_directory import folder_of
from control_plane.registry.places import Place
from control_plane.registry.routing import Router
from control_plane.settings import Settings
from control_plane.triton import TritonClient
from control_plane.version_facts import VersionFacts, read_version_facts

MODELS_TTL_S = 1.0
PROCESSES_TTL_S = 5.0
PROCESS_TIMEOUT_S = 2.0
MAX_PROBES_AT_ONCE = 16
PACKAGES = ("llmos", "onnxruntime-gpu", "onnxruntime", "torch", "transformers", "tritonclient", "flask", "celery")

log = structlog.get_logger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class ModelStatus:
    """``state`` is ``ready`` (the engine answered a probe), ``loading`` or ``failed``.

    ``reason`` says why in one word, ``message`` in a sentence, which may name paths: it is for those who may read.
    """

    name: str
    version: int
    state: str
    facts: VersionFacts
    latency_ms: float | None = None
    reason: str | None = None
    message: str | None = None


@dataclass(frozen=True)
class ProcessStatus:
    """``state`` is ``ready`` or ``failed``; ``detail`` says what it is, or why it failed."""

    name: str
    purpose: str
    state: str
    detail: str


class Cached(Generic[T]):
    """The value of ``compute``, at most ``ttl_s`` old. One thread computes, the others wait for it."""

    def __init__(self, ttl_s: float, compute: Callable[[], T]) -> None:
        self._ttl_s = ttl_s
        self._compute = compute
        self._lock = threading.Lock()
        self._value: tuple[float, T] | None = None

    def get(self) -> T:
        with self._lock:
            if self._value is None or time.monotonic() - self._value[0] >= self._ttl_s:
                value = self._compute()
                self._value = (time.monotonic(), value)
            return self._value[1]


class SystemStatus:
    """Answers of one web process, shared by its threads."""

    def __init__(self, app: Flask) -> None:
        self._app = app
        self._settings: Settings = app.config["SETTINGS"]
        self._triton: TritonClient = app.extensions["triton"]
        self._router: Router = app.extensions["router"]
        self._models = Cached(MODELS_TTL_S, self._ask_models)
        self._processes = Cached(PROCESSES_TTL_S, self._ask_processes)

    def models(self) -> list[ModelStatus]:
        return self._models.get()

    def processes(self) -> list[ProcessStatus]:
        return self._processes.get()

    def _ask_models(self) -> list[ModelStatus]:
        """The production version of every model."""
        production = self._router.production_versions()
        if not production:
            return []
        with ThreadPoolExecutor(min(MAX_PROBES_AT_ONCE, len(production)), thread_name_prefix="probe") as pool:
            return list(pool.map(self._ask_model, production, production.values()))

    def _ask_model(self, name: str, version: int) -> ModelStatus:
        known = serving_state.read(self._settings).where(name, version)
        place = Place(name, version) if known is None else known[0]
        facts = read_version_facts(folder_of(self._settings.model_repository, place))
        try:
            probe = self._triton.probe(*place, timeout_s=self._settings.probe_timeout_s)
        except RequestTimeout as error:
            why = f"no answer to a probe within {self._settings.probe_timeout_s:g} s"
            return ModelStatus(name, version, "failed", facts, reason=error.code, message=why)
        except (NotFound, ModelNotReady) as error:
            if known is None:
                why = "waiting for Triton to load it"
                return ModelStatus(name, version, "loading", facts, reason=error.code, message=why)
            found = known[1]
            state = "failed" if found.state == serving_state.FAILED_TO_LOAD else "loading"
            why = found.message or f"it is {found.state}"
            return ModelStatus(name, version, state, facts, reason=found.reason or found.state, message=why)
        except ControlPlaneError as error:
            return ModelStatus(name, version, "failed", facts, reason=error.code, message=str(error))
        return ModelStatus(name, version, "ready", facts, latency_ms=round(probe.latency_s * 1000, 1))

    def _ask_processes(self) -> list[ProcessStatus]:
        questions = [
            ("Triton", "runs the engine", self._ask_triton),
            ("Reconciler", "keeps served what the registry wants", self._ask_reconciler),
            ("Worker", "runs light jobs", lambda: self._ask_queues("worker")),
            ("Heavy worker", "runs exports, proofs and training", lambda: self._ask_queues("worker-heavy")),
            ("Redis", "wakes workers", self._ask_redis),
            ("Database", "the record of everything", self._ask_database),
        ]
        with ThreadPoolExecutor(len(questions), thread_name_prefix="status") as pool:
            return list(pool.map(lambda question: _ask(*question), questions))

    def _ask_triton(self) -> str:
        return f"version {self._triton.server_version()}"

    def _ask_reconciler(self) -> str:
        if not serving_state.read(self._settings).is_current:
            raise ControlPlaneError("no sign of life; see its log")
        return "watching"

    def _ask_queues(self, program: str) -> str:
        """What the reconciler's process last heard of a worker; of several queues that of which it heard least."""
        known = worker_watch.read(self._settings)
        state = min((known[queue] for queue in worker_watch.WORKERS[program]), key=lambda each: each.answered_at or 0)
        if not state.is_answered:
            raise ControlPlaneError(state.detail)
        return f"{state.detail}, {_age_s(state):.0f} s ago"

    def _ask_redis(self) -> str:
        with redis.Redis.from_url(self._settings.redis_url, socket_timeout=PROCESS_TIMEOUT_S) as client:
            return f"version {client.info('server')['redis_version']}"

    def _ask_database(self) -> str:
        with self._app.app_context():
            db.session.execute(sqlalchemy.text("SELECT 1"))
            return str(db.engine.dialect.name)


def health_report(
    models: list[ModelStatus], queues: Mapping[str, QueueState], may_read: bool
) -> tuple[dict[str, Any], bool]:
    """Body of /health/ready, and whether the production version of every model (at least one) is ready.

    Without ``may_read`` it has no messages. Workers serve no requests, so their queues decide nothing.
    """
    is_ready = bool(models) and all(model.state == "ready" for model in models)
    report: dict[str, Any] = {
        "status": "ready" if is_ready else "not_ready",
        "models": {
            model.name: {
                "version": model.version,
                "state": model.state,
                "latency_ms": model.latency_ms,
                "reason": model.reason,
                "message": model.message if may_read else None,
            }
            for model in models
        },
        "queues": {
            name: {"is_answered": queue.is_answered, "answered_s_ago": _age_s(queue)} for name, queue in queues.items()
        },
    }
    if not models:
        report["reason"] = "no model has a production version"
    return report, is_ready


def _age_s(queue: QueueState) -> float | None:
    return None if queue.answered_at is None else round(max(0.0, time.time() - queue.answered_at), 1)


def package_versions() -> dict[str, str]:
    """Versions of what matters here, without importing any of it."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _ask(name: str, purpose: str, question: Callable[[], str]) -> ProcessStatus:
    try:
        return ProcessStatus(name, purpose, "ready", question())
    except ControlPlaneError as error:
        # One line is enough for a page; the log of the process has the rest.
        return ProcessStatus(name, purpose, "failed", str(error).splitlines()[0])
    except (redis.RedisError, sqlalchemy.exc.SQLAlchemyError) as error:
        # Where it is and what it said is not for everybody who sees the page.
        log.warning("process_does_not_answer", process=name, reason=reason_of(error))
        return ProcessStatus(name, purpose, "failed", "it does not answer; see the log of the web server")
