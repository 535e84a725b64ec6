"""The OpenAI-shaped door, /v1: requests are validated, answered by Triton, and shaped as OpenAI's clients expect."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flask import Flask

    from control_plane.settings import Settings

RESERVED_THREADS = 4
"""Web threads that completions leave alone, so that health and pages answer under full load."""


def init_app(app: Flask, settings: Settings) -> None:
    from control_plane.gateway.views import gateway

    # A quarter of the threads may be taken by streams of events (jobs).
    num_slots = settings.web_threads - settings.web_threads // 4 - RESERVED_THREADS
    app.extensions["completion_slots"] = threading.BoundedSemaphore(max(1, num_slots))
    app.register_blueprint(gateway)
