"""Routes of traffic: production beside the canary, and Prometheus' text."""

from __future__ import annotations

from typing import Any

from apiflask import APIBlueprint
from flask import Response, current_app

from control_plane.auth.services import require_key
from control_plane.jobs import worker_watch
from control_plane.operations import Operation
from control_plane.traffic import prometheus, services
from control_plane.traffic.recorder import TrafficRecorder
from control_plane.traffic.schemas import TrafficOut, TrafficQuery

traffic = APIBlueprint("traffic", __name__)
TEXT = "text/plain"


@traffic.get("/api/v1/models/<name>/traffic")
@require_key("viewer")
@Operation(TrafficOut, query=TrafficQuery)
def show_traffic(name: str, query: TrafficQuery) -> dict[str, Any]:
    """What production and the canary met over the last minutes, and since the canary began."""
    return services.compare(_recorder(), name, query.minutes)


@traffic.get("/metrics")
@require_key("viewer")
@Operation(TEXT)
def metrics() -> Response:
    """The requests of this web process since it started, and when workers last answered, as Prometheus' text."""
    shown = prometheus.render(_recorder().totals(), worker_watch.read(current_app.config["SETTINGS"]))
    return Response(shown, content_type=f"{TEXT}; version=0.0.4; charset=utf-8")


def _recorder() -> TrafficRecorder:
    recorder: TrafficRecorder = current_app.extensions["traffic"]
    return recorder
