"""The index page with its live part and the health endpoints, which are public: they show states, never content, and
messages, which may name paths, only to those who may read. And the report of the system, for operators.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from apiflask import APIBlueprint
from flask import Response, current_app, jsonify, render_template, request

from control_plane.auth.services import known_principal, require_key
from control_plane.jobs import worker_watch
from control_plane.operations import HTML, Operation
from control_plane.settings import Settings
from control_plane.web.schemas import Live, Readiness, SystemOut
from control_plane.web.services import SystemStatus, health_report, package_versions
from control_plane.web.system import SystemReport

pages = APIBlueprint("web", __name__, template_folder="templates")


@pages.get("/")
@Operation(HTML)
def index() -> str:
    """The page that shows what is running."""
    settings = _settings()
    return render_template(
        "index.html",
        base_url=request.host_url.rstrip("/"),
        settings=settings,
        versions=package_versions(),
        **_live(),
    )


@pages.get("/status")
@Operation(HTML)
def status() -> str:
    """The part of the index page that changes; the page fetches it every few seconds."""
    return render_template("status.html", **_live())


@pages.get("/health")
@pages.get("/health/live")
@Operation(Live)
def live() -> dict[str, str]:
    """The web process answers."""
    return {"status": "live"}


@pages.get("/health/ready")
@Operation(Readiness, also=(503,))
def ready() -> Response:
    """Whether every production version answers a one-token probe; 503 if not, with the reason per model.

    Those who send a key with the scope ``read``, or have signed in, also get each message.
    """
    report, is_ready = health_report(_system().models(), worker_watch.read(_settings()), _may_read())
    response = jsonify(report)
    response.status_code = 200 if is_ready else 503
    return response


@pages.get("/api/v1/system")
@require_key("operator")
@Operation(SystemOut)
def system() -> Mapping[str, Any]:
    """Processes, workers, Triton, database, Redis, disks and memory; who does not answer says why in ``error``."""
    report: SystemReport = current_app.extensions["system_report"]
    return report.read()


def _live() -> dict[str, Any]:
    system = _system()
    return {"models": system.models(), "processes": system.processes(), "may_read": _may_read()}


def _may_read() -> bool:
    principal = known_principal()
    return principal is not None and "read" in principal.scopes


def _system() -> SystemStatus:
    return current_app.extensions["system_status"]


def _settings() -> Settings:
    return current_app.config["SETTINGS"]
