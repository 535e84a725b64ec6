"""Does again what an event log says, and compares every plan: ``python -m triton_backend FOLDER --replay LOG``.

Requests enter at the step at which they entered then, and leave early where they did. No thread and no clock is
involved, so the first plan that differs is the first consequence of whatever differs.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from triton_backend.engine import Engine
from triton_backend.errors import EngineError
from triton_backend.event_log import plan_json, read_events, request_from
from triton_backend.protocol import GenerateResponse
from triton_backend.scheduler import StepPlan
from triton_backend.sequence import RequestState, ResponseSink


class _Nowhere(ResponseSink):
    """A sink for answers that nobody waits for."""

    def send(self, response: GenerateResponse) -> None:
        pass

    def is_cancelled(self) -> bool:
        return False


def replay(engine: Engine, path: Path) -> tuple[int, str | None]:
    """How many steps were done again, and what the first difference is, if any. ``engine`` is not started."""
    states: list[RequestState] = []
    num_steps = 0
    for event in read_events(path):
        if event["event"] == "submitted":
            states.append(engine.prepare(request_from(event), _Nowhere()))
            engine.accept(states[-1])
        elif event["event"] == "aborted":
            engine.abort(states[event["request"]], EngineError(event["reason"]))
        else:
            plans: list[dict[str, Any]] = []
            engine.step(partial(_note, plans))
            if difference := _difference(event, plans[0]):
                return num_steps, f"step {event['step']}: {difference}"
            num_steps += 1
    return num_steps, None


def _note(plans: list[dict[str, Any]], plan: StepPlan) -> None:
    plans.append(plan_json(plan))


def _difference(then: dict[str, Any], now: dict[str, Any]) -> str | None:
    return next((f"{name} were {then[name]}, now {value}" for name, value in now.items() if then[name] != value), None)
