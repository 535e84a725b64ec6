"""What the health endpoints answer."""

from __future__ import annotations

from typing import Literal

from control_plane.operations import Out


class Live(Out):
    status: Literal["live"]


class ModelReadiness(Out):
    """``state`` is ready, loading or failed; ``reason`` says why."""

    version: int
    state: str
    latency_ms: float | None
    reason: str | None


class Readiness(Out):
    """``reason`` is there if no model is installed."""

    status: Literal["ready", "not_ready"]
    models: dict[str, ModelReadiness]
    reason: str = ""
