"""Which engine answers a request: a model's name becomes a version and the place where that is loaded.

    chat             production, or, for the canary's share of the requests, the canary
    chat@canary      what an alias points to
    chat@3           one version

``Router`` belongs to one web process and is shared by its threads. What it knows is at most ``TTL_S`` old: aliases from
SQL, states from serving.json. While SQL does not answer, it goes on with what it knew.
"""

from __future__ import annotations

import hashlib
import itertools
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import structlog
from flask import Flask
from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError

from control_plane.errors import ControlPlaneError, ModelNotReady, NotFound
from control_plane.extensions import db
from control_plane.registry import serving_state
from control_plane.registry.places import Place, model_of
from control_plane.registry.serving_state import LOADED, ServingState
from control_plane.registry.tables import CANARY, PRODUCTION, Alias, Model, Version

TTL_S = 0.2
GOLDEN_RATIO = (5**0.5 - 1) / 2
"""Multiples of it fall evenly into [0, 1), in any stretch of them: shares are met within a few requests."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Route:
    """``name`` is the model's in the registry, ``place`` where ``version`` is; ``is_canary``: the split chose it."""

    name: str
    version: int
    place: Place
    is_canary: bool = False


@dataclass(frozen=True)
class _Table:
    """Version numbers by model and alias, and the weight of its canary by model."""

    aliases: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    serving: ServingState = field(default_factory=ServingState)
    read_at: float = float("-inf")


class Router:
    def __init__(self, app: Flask) -> None:
        self._app = app
        self._settings = app.config["SETTINGS"]
        self._lock = threading.Lock()
        self._table = _Table()
        self._counter = itertools.count()

    def route(self, name: str, affinity: str | None = None, max_age_s: float = TTL_S) -> Route:
        """Where a request for ``name`` goes. Requests with the same ``affinity`` stay on one side of a canary split.

        Raises NotFound if there is no such model, alias or version, ModelNotReady if it is not loaded.
        """
        table = self._fresh(max_age_s)
        model, separator, wanted = name.partition("@")
        aliases = table.aliases.get(model, {})
        if separator:
            return self._exact(table, model, wanted, aliases)
        if PRODUCTION not in aliases:
            raise NotFound(
                f"model {name!r:.200} does not exist, or has no production version; GET /v1/models lists those that do"
            )
        if CANARY in aliases and self._is_drawn(table.weights.get(model, 0.0), model, affinity):
            canary = _loaded(table.serving, model, aliases[CANARY])
            # A canary that is not there costs nobody an answer.
            if canary is not None:
                return Route(model, aliases[CANARY], canary, is_canary=True)
        return self._found(table, model, aliases[PRODUCTION])

    def served(self) -> list[Route]:
        """The production version of every model that has one loaded, by name."""
        table = self._fresh(TTL_S)
        found = []
        for model, aliases in sorted(table.aliases.items()):
            place = _loaded(table.serving, model, aliases[PRODUCTION]) if PRODUCTION in aliases else None
            if place is not None:
                found.append(Route(model, aliases[PRODUCTION], place))
        return found

    def production_versions(self) -> dict[str, int]:
        """Version numbers by model, loaded or not."""
        aliases = self._fresh(TTL_S).aliases
        return {model: found[PRODUCTION] for model, found in sorted(aliases.items()) if PRODUCTION in found}

    def _exact(self, table: _Table, model: str, wanted: str, aliases: Mapping[str, int]) -> Route:
        if wanted in aliases:
            return self._found(table, model, aliases[wanted])
        is_number = wanted.isascii() and wanted.isdecimal() and len(wanted) < 10
        versions = {place.version for place in table.serving.places if model_of(place) == model}
        if is_number and int(wanted) in versions:
            return self._found(table, model, int(wanted))
        known = ", ".join(f"{model}@{name}" for name in [*aliases, *sorted(versions)]) or "none"
        raise NotFound(f"model {f'{model}@{wanted}'!r:.200} is not served; these are: {known:.300}")

    def _found(self, table: _Table, model: str, number: int) -> Route:
        place = _loaded(table.serving, model, number)
        if place is None:
            raise _not_ready(table.serving, model, number)
        return Route(model, number, place)

    def _is_drawn(self, weight: float, model: str, affinity: str | None) -> bool:
        if affinity is None:
            share = next(self._counter) * GOLDEN_RATIO % 1.0
        else:
            digest = hashlib.sha256(f"{model}\0{affinity}".encode(errors="surrogatepass")).digest()
            share = int.from_bytes(digest[:8]) / 2**64
        return share * 100 < weight

    def _fresh(self, max_age_s: float) -> _Table:
        with self._lock:
            if time.monotonic() - self._table.read_at >= max_age_s:
                self._table = self._read()
            return self._table

    def _read(self) -> _Table:
        serving = serving_state.read(self._settings)
        aliases: dict[str, dict[str, int]] = {}
        weights = {}
        query = select(Model.name, Alias.name, Alias.weight, Version.number).join(Alias.model).join(Alias.version)
        try:
            with self._app.app_context():
                for model, alias, weight, number in db.session.execute(query):
                    aliases.setdefault(model, {})[alias] = number
                    if alias == CANARY:
                        weights[model] = weight or 0.0
        except SQLAlchemyError as error:
            log.warning("aliases_unreadable", reason=str(error))
            return _Table(self._table.aliases, self._table.weights, serving, time.monotonic())
        return _Table(aliases, weights, serving, time.monotonic())


def model_name(name: str) -> str:
    """``chat`` of ``chat@canary``."""
    return name.partition("@")[0]


def _loaded(serving: ServingState, model: str, number: int) -> Place | None:
    found = serving.where(model, number)
    return found[0] if found is not None and found[1].state == LOADED else None


def _not_ready(serving: ServingState, model: str, number: int) -> ControlPlaneError:
    found = serving.where(model, number)
    why = "it is not loaded yet" if found is None else found[1].message or f"it is {found[1].state}"
    return ModelNotReady(f"version {number} of model {model!r} is not ready: {why}")
