"""Progress of an export as plain mappings, one per event, ready to be a line of JSON.

{"event": "started", "checkpoint": …, "out": …}
{"event": "step", "step": "trace", "done": 2, "total": 7}          ``trace`` begins, 2 of 7 steps are done
{"event": "progress", "step": "certify", "done": 3, "total": 16}   inside a long step
{"event": "finished", "folder": …, "digest": …, "size_bytes": …, "graph": {…}, "certificate": {…}}
     ``graph``: {"traced": {"num_nodes": …, "num_nodes_per_layer": …}, "fused": {…}}
{"event": "error", "code": "UNSAFE_CHECKPOINT", "message": …}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Event = Mapping[str, Any]
EmitEvent = Callable[[Event], None]


class Progress:
    """Turns the steps of one export into events; owned by the thread that exports."""

    def __init__(self, emit: EmitEvent, steps: tuple[str, ...]) -> None:
        self._emit = emit
        self._steps = steps
        self._step = steps[0]

    def step(self, name: str) -> None:
        self._step = name
        self._emit({"event": "step", "step": name, "done": self._steps.index(name), "total": len(self._steps)})

    def progress(self, done: int, total: int) -> None:
        self._emit({"event": "progress", "step": self._step, "done": done, "total": total})
