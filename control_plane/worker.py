"""Entry point of the workers: ``celery --app control_plane.worker worker --pool threads --queues default``.

Jobs run their heavy work in child processes, so a pool of threads is enough. Every worker also mends: it gives the
jobs of dead workers to living ones.
"""

from __future__ import annotations

import logging
import threading

from celery.signals import setup_logging, worker_ready, worker_shutting_down

from control_plane import create_app
from control_plane.jobs import mending, runner
from control_plane.logs import configure_logging
from control_plane.settings import Settings


@setup_logging.connect
def _setup_logging(**_: object) -> None:
    # Connecting a receiver keeps Celery from installing its own log format.
    configure_logging("worker")
    # Each message, a knock on the door or the canary, would be told twice; what jobs do, their runner tells.
    for name in ("celery.worker.strategy", "celery.app.trace"):
        logging.getLogger(name).setLevel(logging.WARNING)


@worker_ready.connect
def _start_mending(**_: object) -> None:
    stopping = runner.stopping(flask_app)
    threading.Thread(target=mending.keep_mending, args=(flask_app, stopping), name="mend", daemon=True).start()


@worker_shutting_down.connect
def _give_jobs_back(**_: object) -> None:
    runner.stopping(flask_app).set()


flask_app = create_app(Settings.from_environment())
celery = flask_app.extensions["celery"]
celery.flask_app = flask_app
