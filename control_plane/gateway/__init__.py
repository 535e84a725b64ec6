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

    app.extensions["completion_slots"] = threading.BoundedSemaphore(max(1, settings.web_threads - RESERVED_THREADS))
    app.register_blueprint(gateway)
