"""What is being served, as the reconciler last saw it: ``LLMOS_HOME/run/serving.json``.

The reconciler alone writes the file, in one step; the web server, the CLI and tests read it. States are KServe's words.

    {"format": 1, "updated_at": …, "triton_is_reachable": true,
     "models": {"chat": {"version": 2, "state": "Loaded", "since": …, "reason": null, "message": null, …}},
     "places": {"chat/2": {…}, "chat.canary/3": {…}}}

``models`` is about the production version of each model; ``places`` about every version that should be loaded.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from control_plane.registry.places import Place, possible_places
from control_plane.settings import Settings

FORMAT = 2
PENDING, LOADING, LOADED, FAILED_TO_LOAD, STANDBY = "Pending", "Loading", "Loaded", "FailedToLoad", "Standby"
HEARTBEAT_S = 5.0
"""The reconciler writes at least this often."""


@dataclass(frozen=True)
class ModelState:
    """``state`` is Pending, Loading, Loaded or FailedToLoad; ``reason`` one word of KServe's, ``message`` a sentence.
    A version that nobody wants loaded is on Standby.

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
    places: Mapping[Place, ModelState] = field(default_factory=dict)

    @property
    def is_current(self) -> bool:
        return time.time() - self.updated_at < 3 * HEARTBEAT_S

    def where(self, name: str, number: int) -> tuple[Place, ModelState] | None:
        """Where a version is loaded, or else what is known of its loading; None if it is on Standby."""
        found = [(place, self.places[place]) for place in possible_places(name, number) if place in self.places]
        return min(found, key=lambda item: item[1].state != LOADED, default=None)


def path_of(settings: Settings) -> Path:
    return settings.run_dir / "serving.json"


def write(settings: Settings, state: ServingState) -> None:
    path = path_of(settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    places = {str(place): dataclasses.asdict(found) for place, found in state.places.items()}
    document = {"format": FORMAT, **dataclasses.asdict(dataclasses.replace(state, places={})), "places": places}
    staged.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    staged.rename(path)


def read(settings: Settings) -> ServingState:
    """The last written state; an empty one if there is none that can be read."""
    try:
        document = json.loads(path_of(settings).read_text(encoding="utf-8"))
        models = {name: ModelState(**model) for name, model in document["models"].items()}
        places = {Place.parse(text): ModelState(**found) for text, found in document["places"].items()}
        return ServingState(models, document["triton_is_reachable"], document["updated_at"], places)
    except (OSError, ValueError, TypeError, KeyError):
        return ServingState()
