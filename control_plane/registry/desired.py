"""What should be loaded, from what was decided. Pure: no SQL, no clock, no Triton.

    aliases, deployments in progress, warm versions ─► ModelIntent ─┐
    places that are loaded now ─────────────────────────────────────┴─► desired_places

A version that moves is loaded in its new place before it leaves the old one, so that it can always be reached.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from control_plane.registry.places import Place, possible_places, proper_place


@dataclass(frozen=True)
class ModelIntent:
    """What was decided about one model: ``wanted`` maps the numbers of the versions to be loaded to their digests.

    ``sizes`` are those of the versions' folders in bytes, where they are known.
    """

    name: str
    production: int | None
    wanted: Mapping[int, str] = field(default_factory=dict)
    sizes: Mapping[int, int] = field(default_factory=dict)


def desired_places(intent: ModelIntent, loaded: Collection[Place]) -> dict[Place, str]:
    """Where versions of one model should be loaded, with their digests."""
    desired = {}
    for number, digest in intent.wanted.items():
        proper = proper_place(intent.name, number, intent.production)
        desired[proper] = digest
        for place in possible_places(intent.name, number):
            # Above production nothing may stay in the model that unversioned requests reach.
            may_stay = place.model != intent.name or proper.model == intent.name
            if may_stay and place in loaded and proper not in loaded:
                desired[place] = digest
    return desired | _stand_in(intent, loaded, desired)


def _stand_in(intent: ModelIntent, loaded: Collection[Place], desired: Mapping[Place, str]) -> dict[Place, str]:
    """Until production is loaded for unversioned requests, what answered them before goes on doing so."""
    if intent.production is None or Place(intent.name, intent.production) in loaded:
        return {}
    below = [place for place in loaded if place.model == intent.name and place.version < intent.production]
    return {} if not below or max(below) in desired else {max(below): ""}
