"""Who may do what: API keys, users, roles, scopes, and the record of changes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flask import Flask


def init_app(app: Flask) -> None:
    from control_plane.auth.hashes import Passwords
    from control_plane.auth.views import auth

    app.extensions["passwords"] = Passwords()
    app.register_blueprint(auth)
