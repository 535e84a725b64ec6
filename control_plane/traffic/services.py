"""Production beside the canary: what both met over the last minutes, and since the canary began."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import select

from control_plane.extensions import db
from control_plane.registry.aliases import of_model
from control_plane.registry.services import get_model
from control_plane.registry.tables import CANARY, PRODUCTION, UP_TO_DATE, Alias, Deployment, Model
from control_plane.traffic.counts import figures, total_of
from control_plane.traffic.recorder import HOUR_S, KEPT_S, MINUTE_S, Slot, TrafficRecorder

MINUTES_PER_HOUR = HOUR_S // MINUTE_S


@dataclass(frozen=True)
class Window:
    """Whole minutes from ``minute`` (since the epoch) to now."""

    minute: int
    now_s: float

    @property
    def since(self) -> datetime:
        return datetime.fromtimestamp(self.minute * MINUTE_S, UTC).replace(tzinfo=None)

    @property
    def seconds(self) -> float:
        return max(1.0, self.now_s - self.minute * MINUTE_S)

    def slots(self, model: str, version: int) -> list[Slot]:
        """Minutes up to the next full hour, from then on hours."""
        minute_now = int(self.now_s) // MINUTE_S
        next_hour = -(-self.minute // MINUTES_PER_HOUR)
        num_minutes = min(next_hour * MINUTES_PER_HOUR, minute_now + 1)
        return [
            *(Slot(model, version, MINUTE_S, index) for index in range(self.minute, num_minutes)),
            *(Slot(model, version, HOUR_S, index) for index in range(next_hour, minute_now // MINUTES_PER_HOUR + 1)),
        ]


def window_since(began_s: float, now_s: float) -> Window:
    """From the minute of ``began_s`` on, or as far back as something is kept: later, then, and at a full hour."""
    minute = int(began_s) // MINUTE_S
    if now_s - began_s > KEPT_S[MINUTE_S] - HOUR_S:
        hour = max(-(-minute // MINUTES_PER_HOUR), int(now_s - KEPT_S[HOUR_S]) // HOUR_S + 1)
        minute = hour * MINUTES_PER_HOUR
    return Window(minute, now_s)


def compare(recorder: TrafficRecorder, name: str, minutes: int) -> dict[str, Any]:
    """Raises NotFound. ``is_complete``: Redis answered; without it there is only what waits to be stored there."""
    model = get_model(name)
    aliases = {alias.name: alias for alias in of_model(model)}
    now_s = time.time()
    windows = {"recent": window_since(now_s - (minutes - 1) * MINUTE_S, now_s)}
    if CANARY in aliases:
        windows["since_canary"] = window_since(_began(model, aliases[CANARY]), now_s)
    versions = {role: aliases[role].version.number for role in (PRODUCTION, CANARY) if role in aliases}
    # A web thread must not keep a connection to the database while it waits for Redis.
    db.session.rollback()
    recorder.flush()
    wanted = {
        slot for window in windows.values() for version in versions.values() for slot in window.slots(name, version)
    }
    stored, pending = recorder.read(wanted), recorder.pending()
    shown = {
        key: {
            "since": window.since,
            "seconds": window.seconds,
            **{role: _figures(window, name, version, stored or {}, pending) for role, version in versions.items()},
        }
        for key, window in windows.items()
    }
    return {"model": name, "is_complete": stored is not None, **shown}


def _figures(
    window: Window,
    model: str,
    version: int,
    stored: Mapping[Slot, dict[str, int]],
    pending: Mapping[Slot, dict[str, int]],
) -> dict[str, Any]:
    parts: Iterable[dict[str, int]] = (stored.get(slot, {}) for slot in window.slots(model, version))
    waiting = (
        counts
        for slot, counts in pending.items()
        if (slot.model, slot.version) == (model, version) and slot.number >= window.minute
    )
    return {"version": version, **asdict(figures(total_of([*parts, *waiting]), window.seconds))}


def _began(model: Model, canary: Alias) -> float:
    """When the canary's version became the canary; another weight since then does not count."""
    query = select(Deployment).where(Deployment.model_id == model.id, Deployment.state == UP_TO_DATE)
    began = canary.updated_at
    for deployment in db.session.scalars(query.order_by(Deployment.id.desc())):
        is_version = deployment.version_id == canary.version_id
        if deployment.kind == "canary" and is_version and deployment.finished_at is not None:
            began = deployment.finished_at
        elif is_version or deployment.alias == CANARY or deployment.kind == "withdraw":
            break
    return began.replace(tzinfo=UTC).timestamp()
