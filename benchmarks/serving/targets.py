"""What serving is meant to reach, and how far it did: every line names both numbers and their ratio."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.engines import BARE, OURS
from benchmarks.serving.figures import best

Engines = Mapping[str, Mapping[str, Any]]
PEERS = "peers"


@dataclass(frozen=True)
class Target:
    """Tokens a second of ``ours`` divided by those of the best among ``others`` (PEERS, or an engine's label) whose
    weights have one of ``precisions``; ``wanted`` by number of clients."""

    title: str
    ours: str
    others: str
    precisions: tuple[str, ...]
    wanted: Mapping[str, float]

    def accepts(self, engine: Mapping[str, Any]) -> bool:
        is_other = engine["label"] not in (OURS, BARE) if self.others == PEERS else engine["label"] == self.others
        return is_other and engine["precision"] in self.precisions


_OF_LIMIT = {"1": 0.9, "8": 0.9, "32": 0.9}

TARGETS = (
    Target("fp32 beside the best fp32 peer", "llmos-fp32", PEERS, ("fp32",), {"1": 1.05, "8": 1.6, "32": 2.0}),
    Target("int8 beside the best quantized peer", "llmos-int8", PEERS, ("int8", "int4"), {"1": 1.3, "8": 2.3, "32": 3}),
    Target("fp32 through Triton beside bare steps", "llmos-fp32", BARE, ("fp32",), _OF_LIMIT),
    Target("int8 through Triton beside bare steps", "llmos-int8", BARE, ("int8",), _OF_LIMIT),
)


def reached(engines: Engines) -> list[dict[str, Any]]:
    """One entry per target and number of clients, where both sides were measured."""
    entries = []
    for target in TARGETS:
        others = {name: engine for name, engine in engines.items() if target.accepts(engine)}
        if target.ours in engines and others:
            entries += [_entry(target, engines, others, clients) for clients in engines[target.ours]["clients"]]
    return entries


def _entry(target: Target, engines: Engines, others: Engines, clients: str) -> dict[str, Any]:
    name = best(others, clients)
    ours = engines[target.ours]["clients"][clients]["tokens_per_s"]
    theirs = engines[name]["clients"][clients]["tokens_per_s"]
    wanted = target.wanted.get(clients)
    return {
        "title": target.title,
        "clients": clients,
        "ours": ours,
        "other": name,
        "theirs": theirs,
        "ratio": ours / theirs,
        "wanted": wanted,
        "is_met": None if wanted is None else ours / theirs >= wanted,
    }
