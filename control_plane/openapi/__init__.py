"""The OpenAPI document of every declared operation, and a page to browse it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flask import Flask


def init_app(app: Flask) -> None:
    from control_plane.openapi.views import openapi

    app.register_blueprint(openapi)
