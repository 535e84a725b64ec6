"""Entry point of the workers: ``celery --app control_plane.worker worker --pool threads --queues default``.

Jobs run their heavy work in child processes, so a pool of threads is enough. Every worker also mends: it gives the
jobs of dead workers to living ones.
"""

from __future__ import annotations

import threading

import structlog
from celery.signals import setup_logging, worker_ready, worker_shutting_down

from control_plane import create_app
from control_plane.jobs import runner, services
from control_plane.logs import configure_logging
from control_plane.settings import Settings

MEND_S = 2.0
log = structlog.get_logger()


@setup_logging.connect
def _setup_logging(**_: object) -> None:
    # Connecting a receiver keeps Celery from installing its own log format.
    configure_logging("worker")


@worker_ready.connect
def _start_mending(**_: object) -> None:
    threading.Thread(target=_mend, name="mend", daemon=True).start()


@worker_shutting_down.connect
def _give_jobs_back(**_: object) -> None:
    runner.stopping(flask_app).set()


def _mend() -> None:
    while not runner.stopping(flask_app).wait(MEND_S):
        try:
            with flask_app.app_context():
                services.mend(celery)
        except Exception:
            # Whatever it was, the next look is two seconds away; a thread that ended would never look again.
            log.exception("mending_failed")


flask_app = create_app(Settings.from_environment())
celery = flask_app.extensions["celery"]
celery.flask_app = flask_app
