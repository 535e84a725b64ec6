"""The control plane: what runs beside the engine so that people can use it.

``create_app`` is the web application's table of contents. Everything it needs is imported inside it, so that a child
process that only wants ``control_plane.settings`` does not load Flask, gRPC and the database.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from apiflask import APIFlask

    from control_plane.settings import Settings
    from control_plane.triton import TritonClient


def create_app(settings: Settings, triton: TritonClient | None = None) -> APIFlask:
    """Build the web application; ``triton`` replaces the client of the configured server, for tests."""
    from apiflask import APIFlask

    from control_plane import auth, gateway, jobs, openapi, registry, traffic, web
    from control_plane.extensions import init_extensions
    from control_plane.job_kinds import KINDS
    from control_plane.responses import init_responses
    from control_plane.triton import connect

    app = APIFlask("control_plane", title="llmos", static_folder="web/static", enable_openapi=False, json_errors=False)
    app.config["SETTINGS"] = settings
    app.extensions["triton"] = triton or connect(settings)
    init_extensions(app, settings)
    init_responses(app, settings)
    auth.init_app(app, settings)
    jobs.init_app(app, KINDS)
    registry.init_app(app)
    traffic.init_app(app, settings)
    gateway.init_app(app, settings)
    web.init_app(app)
    openapi.init_app(app)
    return app


def upgrade_database(settings: Settings) -> None:
    """Bring the database to the newest schema, from empty or from any earlier version; safe to repeat."""
    import flask_migrate

    from control_plane.extensions import MIGRATIONS_DIR, db

    with create_app(settings).app_context():
        try:
            flask_migrate.upgrade(directory=str(MIGRATIONS_DIR))
        finally:
            db.engine.dispose()
