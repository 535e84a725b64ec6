"""What this installation is made of and how full it is, for operators: processes, workers, Triton, stores, the machine.

``SystemReport`` asks everybody at the same time, each with a limit; whoever does not answer says why in ``error``. What
it heard is told again for some seconds, so that many readers cost one question.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import kombu.exceptions
import psutil
import redis
import sqlalchemy
from flask import Flask

from control_plane.errors import ControlPlaneError
from control_plane.extensions import db
from control_plane.settings import Settings
from control_plane.supervision import SupervisorClient
from control_plane.triton import TritonClient
from control_plane.web.services import Cached, package_versions

TTL_S = 2.0
TIMEOUT_S = 2.0
FAILURES = (
    ControlPlaneError,
    redis.RedisError,
    sqlalchemy.exc.SQLAlchemyError,
    kombu.exceptions.OperationalError,
    OSError,
)


class SystemReport:
    """Answers of one web process, shared by its threads."""

    def __init__(self, app: Flask) -> None:
        self._app = app
        self._settings: Settings = app.config["SETTINGS"]
        self._triton: TritonClient = app.extensions["triton"]
        self._report = Cached(TTL_S, self._ask_all)

    def read(self) -> Mapping[str, Any]:
        return self._report.get()

    def _ask_all(self) -> Mapping[str, Any]:
        questions: dict[str, Callable[[], Mapping[str, Any]]] = {
            "supervisor": self._ask_supervisor,
            "workers": self._ask_workers,
            "triton": self._ask_triton,
            "database": self._ask_database,
            "redis": self._ask_redis,
        }
        with ThreadPoolExecutor(len(questions), thread_name_prefix="system") as pool:
            answers = dict(zip(questions, pool.map(_ask, questions.values()), strict=True))
        return {"versions": package_versions(), **answers, "disks": self._disks(), "memory": _memory()}

    def _ask_supervisor(self) -> Mapping[str, Any]:
        found = SupervisorClient(self._settings).processes()
        if not found:
            raise ControlPlaneError("supervisord does not answer; the processes are run by something else")
        at = time.time()
        return {
            "processes": [
                {
                    "name": process.name,
                    "state": process.state,
                    "pid": process.pid or None,
                    "uptime_s": max(0.0, at - process.started_at) if process.is_running else None,
                }
                for process in found
            ]
        }

    def _ask_workers(self) -> Mapping[str, Any]:
        """Whoever hears the question within the limit; one whose Redis is away hears nothing."""
        answers = self._app.extensions["celery"].control.inspect(timeout=TIMEOUT_S / 2).active_queues() or {}
        found = [
            {"name": name, "queues": sorted(queue["name"] for queue in queues)} for name, queues in answers.items()
        ]
        return {"workers": sorted(found, key=lambda worker: worker["name"])}

    def _ask_triton(self) -> Mapping[str, Any]:
        entries = sorted(self._triton.repository_index(), key=lambda entry: (entry.name, entry.version))
        models = [
            {"name": entry.name, "version": entry.version, "state": entry.state, "reason": entry.reason or None}
            for entry in entries
        ]
        return {"version": self._triton.server_version(), "models": models}

    def _ask_database(self) -> Mapping[str, Any]:
        with self._app.app_context(), db.engine.connect() as connection:
            info = connection.dialect.server_version_info or ()
            return {"kind": connection.dialect.name, "version": ".".join(map(str, info))}

    def _ask_redis(self) -> Mapping[str, Any]:
        limits = {"socket_timeout": TIMEOUT_S, "socket_connect_timeout": TIMEOUT_S}
        with redis.Redis.from_url(self._settings.redis_url, **limits) as client:
            info = client.info()
        return {"version": info["redis_version"], "memory_bytes": info["used_memory"]}

    def _disks(self) -> list[Mapping[str, Any]]:
        folders = {"home": self._settings.home, "model_repository": self._settings.model_repository}
        return [{"name": name, "path": str(path), **_disk(path)} for name, path in folders.items()]


def _ask(question: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
    try:
        return {**question(), "error": None}
    except FAILURES as error:
        return {"error": (str(error) or type(error).__name__).splitlines()[0]}


def _disk(path: Path) -> Mapping[str, int]:
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    usage = shutil.disk_usage(existing)
    return {"total_bytes": usage.total, "free_bytes": usage.free}


def _memory() -> Mapping[str, Any]:
    found = psutil.virtual_memory()
    return {"total_bytes": found.total, "available_bytes": found.available, "num_cpus": os.cpu_count() or 1}
