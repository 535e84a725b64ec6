"""What the gateway's requests met: counted per version, so that a canary can be seen beside production."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flask import Flask

    from control_plane.settings import Settings


def init_app(app: Flask, settings: Settings) -> None:
    from control_plane.traffic.recorder import TrafficRecorder
    from control_plane.traffic.views import traffic

    app.extensions["traffic"] = TrafficRecorder(settings.redis_url)
    app.register_blueprint(traffic)
