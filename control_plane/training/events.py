"""Progress of a recipe as JSON lines on stdout, one object per line, flushed; libraries that print go to stderr.

{"event": "started", "recipe": "pretrain", …settings…}
{"event": "step", "step": "train", "done": 2, "total": 5}               ``train`` begins, 2 of 5 steps are done
{"event": "progress", "step": "train", "done": 120, "total": 900, …}    inside a long step, at most one a second
{"event": "metrics", "step": "evaluate", "perplexity": …, "loss": …}
{"event": "warning", "code": "TIME_LIMIT", "message": …}
{"event": "finished", "folder": …, …}  or  {"event": "error", "code": …, "message": …}
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any, TextIO

PROGRESS_INTERVAL_S = 1.0


class Events:
    """Writes the events of one run; owned by the thread that trains."""

    def __init__(self, stream: TextIO, steps: tuple[str, ...]) -> None:
        self._stream = stream
        self._steps = steps
        self._step = steps[0]
        self._last_progress_s = 0.0

    def emit(self, event: str, **fields: Any) -> None:
        self._stream.write(json.dumps({"event": event, **fields}, ensure_ascii=False) + "\n")
        self._stream.flush()

    def step(self, name: str) -> None:
        self._step = name
        self.emit("step", step=name, done=self._steps.index(name), total=len(self._steps))

    def progress_is_due(self, done: int, total: int) -> bool:
        """The first, the last, and one a second between them."""
        return done in (1, total) or time.monotonic() - self._last_progress_s >= PROGRESS_INTERVAL_S

    def progress(self, done: int, total: int, **fields: Any) -> None:
        if self.progress_is_due(done, total):
            self._last_progress_s = time.monotonic()
            self.emit("progress", step=self._step, done=done, total=total, **fields)

    def metrics(self, **fields: Any) -> None:
        self.emit("metrics", step=self._step, **fields)


def events_on_stdout(steps: tuple[str, ...]) -> Events:
    """Keep stdout for events: everything else that writes to it, C++ libraries too, writes to stderr from here on."""
    sys.stdout.flush()
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return Events(stream, steps)
