"""Who may do what: API keys, users, roles, scopes, and the record of changes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flask import Flask

    from control_plane.settings import Settings


def init_app(app: Flask, settings: Settings) -> None:
    from werkzeug.middleware.proxy_fix import ProxyFix

    from control_plane.auth.hashes import Passwords
    from control_plane.auth.limits import RateLimits
    from control_plane.auth.services import known_payer
    from control_plane.auth.views import auth

    if settings.num_proxies:
        # Every proxy adds to X-Forwarded-For; X-Forwarded-Proto is what the nearest one says.
        app.wsgi_app = ProxyFix(app.wsgi_app, x_for=settings.num_proxies, x_proto=1)  # type: ignore[method-assign]
    app.extensions["passwords"] = Passwords()
    app.extensions["rate_limits"] = RateLimits(app, settings, known_payer)
    app.register_blueprint(auth)
