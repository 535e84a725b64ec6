"""Entry point of the worker: ``celery --app control_plane.worker worker --queues default``."""

from __future__ import annotations

from celery.signals import setup_logging

from control_plane.extensions import create_celery
from control_plane.logs import configure_logging
from control_plane.settings import Settings


@setup_logging.connect
def _setup_logging(**_: object) -> None:
    # Connecting a receiver keeps Celery from installing its own log format.
    configure_logging("worker")


celery = create_celery(Settings.from_environment())
