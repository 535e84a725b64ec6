"""What goes into a suite and what comes out of it. Knows no suite."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exporters.evaluate.data_file import DataFile
from exporters.events import EmitEvent
from triton_backend.config import VersionConfig

PROGRESS_INTERVAL_S = 1.0


@dataclass(frozen=True)
class Task:
    """What one suite is to do. ``settings`` are its options by name; None stands for its own default."""

    folder: Path
    version: VersionConfig
    data: DataFile | None
    settings: Mapping[str, Any]
    emit: EmitEvent


@dataclass(frozen=True)
class Report:
    """What a suite found: ``metrics`` by name; how much they rest on (``counts``); the ``settings`` it ran with, its
    defaults filled in; and some ``examples`` that a person may want to see.
    """

    metrics: Mapping[str, float | int | bool | None]
    counts: Mapping[str, int] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    examples: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Evaluation(Report):
    """A report with what it is about: the version by its ``digest``, the data by its path, size and sha256."""

    suite: str = ""
    folder: Path = Path()
    digest: str = ""
    data: Mapping[str, Any] | None = None


class Ticker:
    """Says at most once a second how far an evaluation is; the owner is whoever reads the answers."""

    def __init__(self, task: Task, limit: int | None) -> None:
        self._task = task
        self._limit = limit
        self._last_s = time.monotonic()

    def tick(self, num_done: int) -> None:
        """``num_done`` of ``limit``, or without a limit the bytes read of all bytes."""
        if time.monotonic() - self._last_s < PROGRESS_INTERVAL_S:
            return
        self._last_s = time.monotonic()
        assert self._task.data is not None
        done, total = self._task.data.num_bytes_read, self._task.data.size_bytes
        if self._limit is not None and num_done / self._limit > done / total:
            done, total = num_done, self._limit
        self._task.emit({"event": "progress", "step": "evaluate", "done": done, "total": total})
