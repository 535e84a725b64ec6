"""Pages for people, and the health of the installation."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flask import Flask


def init_app(app: Flask) -> None:
    from control_plane.web.services import SystemStatus
    from control_plane.web.system import SystemReport
    from control_plane.web.views import pages

    app.extensions["system_status"] = SystemStatus(app)
    app.extensions["system_report"] = SystemReport(app)
    app.register_blueprint(pages)
