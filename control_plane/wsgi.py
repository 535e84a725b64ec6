"""Entry point of the web process: ``gunicorn --worker-class gthread control_plane.wsgi:app``."""

from __future__ import annotations

import atexit

from control_plane import create_app
from control_plane.logs import configure_logging
from control_plane.settings import Settings

configure_logging("web")
app = create_app(Settings.from_environment())
# The last second of counts.
atexit.register(app.extensions["traffic"].flush)
