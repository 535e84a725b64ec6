"""Who may do what: API keys and roles."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flask import Flask


def init_app(app: Flask) -> None:
    """Make the tables known to the database; keys have no routes yet."""
    from control_plane.auth import tables  # noqa: F401
