"""What is being served, as the reconciler last saw it: ``LLMOS_HOME/run/serving.json``.

The reconciler alone writes the file, in one step; the web server, the CLI and tests read it. States are KServe's words.

    {"format": 1, "updated_at": …, "triton_is_reachable": true,
     "models": {"chat": {"version": 2, "state": "Loaded", "since": …, "reason": null, "message": null, …}}}
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from control_plane.settings import Settings

FORMAT = 1
PENDING, LOADING, LOADED, FAILED_TO_LOAD = "Pending", "Loading", "Loaded", "FailedToLoad"
HEARTBEAT_S = 5.0
"""The reconciler writes at least this often."""


@dataclass(frozen=True)
class ModelState:
    """``state`` is Pending, Loading, Loaded or FailedToLoad; ``reason`` one word of KServe's, ``message`` a sentence.

    ``since`` is the Unix time at which the model came into this state; ``num_failures`` counts failures in a row.
    """

    version: int
    state: str
    since: float
    reason: str | None = None
    message: str | None = None
    num_failures: int = 0


@dataclass(frozen=True)
class ServingState:
    """The whole file. One that is older than three heartbeats says that no reconciler is running."""

    models: Mapping[str, ModelState] = field(default_factory=dict)
    triton_is_reachable: bool = False
    updated_at: float = 0.0

    @property
    def is_current(self) -> bool:
        return time.time() - self.updated_at < 3 * HEARTBEAT_S


def path_of(settings: Settings) -> Path:
    return settings.run_dir / "serving.json"


def write(settings: Settings, state: ServingState) -> None:
    path = path_of(settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    staged.write_text(json.dumps({"format": FORMAT, **dataclasses.asdict(state)}, indent=2) + "\n", encoding="utf-8")
    staged.rename(path)


def read(settings: Settings) -> ServingState:
    """The last written state; an empty one if there is none that can be read."""
    try:
        document = json.loads(path_of(settings).read_text(encoding="utf-8"))
        models = {name: ModelState(**model) for name, model in document["models"].items()}
        return ServingState(models, document["triton_is_reachable"], document["updated_at"])
    except (OSError, ValueError, TypeError, KeyError):
        return ServingState()
