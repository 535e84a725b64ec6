"""Progress of an export as plain mappings, one per event, ready to be a line of JSON.

{"event": "started", "checkpoint": …, "out": …}
{"event": "step", "step": "trace", "done": 2, "total": 7, "rss_bytes": …,
 "previous": {"step": "load", "seconds": 1.2, "peak_rss_bytes": …}}  ``trace`` begins, 2 of 7 steps are done
{"event": "progress", "step": "certify", "done": 3, "total": 16}   inside a long step
{"event": "warning", "code": "IGNORED_SETTINGS", "message": …, "settings": {"min_length": 10}}
{"event": "finished", "folder": …, "digest": …, "size_bytes": …, "graph": {…}, "certificate": {…}}
     ``graph``: {"traced": {"num_nodes": …, "num_nodes_per_layer": …}, "fused": {…}}
{"event": "error", "code": "UNSAFE_CHECKPOINT", "message": …}
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any, NoReturn

from exporters.errors import ExportCancelled
from exporters.usage import StepUsage, peak_rss_bytes, reset_peak, rss_bytes

Event = Mapping[str, Any]
EmitEvent = Callable[[Event], None]


class Progress:
    """Turns the steps of one export into events and measures them; owned by the thread that exports."""

    def __init__(self, emit: EmitEvent, steps: tuple[str, ...]) -> None:
        self._emit = emit
        self._steps = steps
        self._step = steps[0]
        self._started_s: float | None = None
        self._used: dict[str, StepUsage] = {}

    def step(self, name: str) -> None:
        event: dict[str, Any] = {"event": "step", "step": name, "done": self._steps.index(name)}
        event |= {"total": len(self._steps), "rss_bytes": rss_bytes()}
        if self._started_s is not None:
            used = self._used[self._step] = self._current()
            event["previous"] = {
                "step": self._step,
                "seconds": round(used.seconds, 2),
                "peak_rss_bytes": used.peak_rss_bytes,
            }
        reset_peak()
        self._step, self._started_s = name, time.monotonic()
        self._emit(event)

    def progress(self, done: int, total: int) -> None:
        self._emit({"event": "progress", "step": self._step, "done": done, "total": total})

    def timings(self) -> dict[str, StepUsage]:
        """What each step took, the running one so far."""
        return {**self._used, self._step: self._current()} if self._started_s is not None else {}

    def _current(self) -> StepUsage:
        assert self._started_s is not None
        return StepUsage(time.monotonic() - self._started_s, peak_rss_bytes())


def events_on_stdout() -> EmitEvent:
    """Keep stdout for events: everything else that writes to it, C++ libraries too, writes to stderr from here on."""
    sys.stdout.flush()
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def emit(event: Event) -> None:
        events.write(json.dumps(event, ensure_ascii=False) + "\n")
        events.flush()

    return emit


def cancel_on_signals() -> None:
    """SIGTERM and SIGINT raise ExportCancelled in the main thread."""
    signal.signal(signal.SIGTERM, _cancel)
    signal.signal(signal.SIGINT, _cancel)


def _cancel(signum: int, frame: FrameType | None) -> NoReturn:
    raise ExportCancelled(f"{signal.Signals(signum).name} stopped the work; nothing was written")
