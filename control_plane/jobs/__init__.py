"""Long work: exports, training, proofs. A job is a row in SQL, run step by step by a worker in child processes."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flask import Flask

    from control_plane.jobs.kinds import JobKind


def init_app(app: Flask, kinds: Mapping[str, JobKind]) -> None:
    from control_plane.jobs.views import jobs

    num_threads: int = app.config["SETTINGS"].web_threads
    app.extensions["event_stream_slots"] = threading.BoundedSemaphore(max(1, num_threads // 4))
    app.extensions["job_kinds"] = kinds
    app.extensions["jobs_stopping"] = threading.Event()
    app.register_blueprint(jobs)
