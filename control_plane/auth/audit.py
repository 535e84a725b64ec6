"""The audit log: every change of what is served, of a role or a key is one row, in the change's transaction."""

from __future__ import annotations

from typing import Any

from flask import g, has_request_context
from sqlalchemy import select

from control_plane.auth.principal import Principal
from control_plane.auth.tables import AuditEvent
from control_plane.extensions import db

SYSTEM = "system"
"""Who acts where no request does: the launcher, a worker, the reconciler."""


def current_actor() -> str:
    """Who is behind the current request: ``key:<prefix>`` or ``user:<name>``; ``system`` outside of requests."""
    principal: Principal | None = g.get("principal") if has_request_context() else None
    return SYSTEM if principal is None else principal.actor


def record(action: str, object_id: str, actor: str | None = None, **details: Any) -> None:
    """Add the row to the current transaction; the caller commits."""
    request_id = g.get("request_id") if has_request_context() else None
    actor = actor or current_actor()
    db.session.add(AuditEvent(actor=actor, action=action, object_id=object_id, details=details, request_id=request_id))


def find(
    actor: str | None, action: str | None, object_id: str | None, before: int | None, limit: int
) -> list[AuditEvent]:
    """Newest first, exactly as asked for; ``before`` is the id of the last event of the page before."""
    query = select(AuditEvent).order_by(AuditEvent.id.desc()).limit(limit)
    wanted = {AuditEvent.actor: actor, AuditEvent.action: action, AuditEvent.object_id: object_id}
    for column, value in wanted.items():
        if value is not None:
            query = query.where(column == value)
    if before is not None:
        query = query.where(AuditEvent.id < before)
    return list(db.session.scalars(query))
