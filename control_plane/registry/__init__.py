"""Models, their versions, and what Triton serves of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flask import Flask


def init_app(app: Flask) -> None:
    from control_plane.registry.adapter_views import adapter_routes
    from control_plane.registry.routing import Router
    from control_plane.registry.views import models

    app.extensions["router"] = Router(app)
    app.register_blueprint(models)
    app.register_blueprint(adapter_routes)
