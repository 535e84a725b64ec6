"""Keeps a long answer to those who may have it: a right that ends in the middle of a stream ends the stream."""

from __future__ import annotations

import time

import structlog
from flask import Flask, current_app, g

from control_plane.auth.principal import Principal
from control_plane.auth.services import identify_again
from control_plane.databases import UNREACHABLE, reason_of

RECHECK_S = 2.0

log = structlog.get_logger(__name__)


class Watch:
    """Whether whoever sent the current request may still have its answer. Owned by the thread that sends it."""

    def __init__(self) -> None:
        self._app: Flask = current_app._get_current_object()  # type: ignore[attr-defined]
        self._principal: Principal = g.principal
        self._role, self._scopes = g.needed
        self._asked_at = time.monotonic()

    def check(self) -> None:
        """To be called often; raises Unauthorized or Forbidden at most ``RECHECK_S`` after the right has ended."""
        at = time.monotonic()
        if at - self._asked_at < RECHECK_S:
            return
        self._asked_at = at
        try:
            with self._app.app_context():
                identify_again(self._principal).require(self._role, self._scopes)
        except UNREACHABLE as error:
            # A database that is busy for a moment takes no right away; the next look is near.
            log.warning("recheck_failed", reason=reason_of(error))
