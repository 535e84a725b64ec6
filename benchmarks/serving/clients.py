"""The main scenario: n clients at once, every engine in turn, several rounds.

Ours is asked over gRPC by a load generator in a process of its own, on the same cores; peers are asked inside their
process, which costs them nothing. A turn starts the engine, warms it up, measures every number of clients, and ends it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from benchmarks import environment
from benchmarks.bench import Failed, rotated
from benchmarks.engines import ENGINES, OURS
from benchmarks.engines.closed_loop import Answer
from benchmarks.serving import figures
from benchmarks.serving.report import load_tables
from benchmarks.serving.run import Run
from benchmarks.serving.triton import MODEL
from benchmarks.serving.workload import LONGEST, SHORTEST, Workload
from benchmarks.worker import peak_rss_bytes

KIND = "Serving"
MIN_EQUAL_TOKENS = 0.9
"""Of an engine in fp32; a near tie that falls the other way changes the rest of an answer."""


def measure(run: Run) -> dict[str, Any]:
    options = run.options
    packages = environment.ensure()
    run.absent |= {name: packages[p] for name in options.engines if (p := ENGINES[name].packages[0]) in packages}
    for name in options.engines:
        with run.bench.leaving_out(name, run.absent):
            run.bench.prepare(name)
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in options.engines}
    order = [
        (f"round {number + 1} of {options.rounds}: {name}", name)
        for number in range(options.rounds)
        for name in rotated(options.engines, number)
    ]
    try:
        for name in run.progress(order, len(order)):
            if name not in run.absent:
                with run.bench.leaving_out(name, run.absent):
                    turns[name].append(_turn(run, name))
    except KeyboardInterrupt:
        run.bench.say("stopped; the turns so far count")
        run.absent |= {name: "the run was stopped before its turn" for name, found in turns.items() if not found}
    engines = _summarised(run, {name: found for name, found in turns.items() if name not in run.absent})
    figures.add_ratios(engines, OURS)
    return {
        "engines": engines,
        "tables": load_tables(engines, [str(n) for n in options.clients]),
        "notes": [_note(run)],
    }


def workloads(run: Run) -> list[Workload]:
    vocab_size = run.vocab_size
    return [Workload(vocab_size, n, run.options.waves, run.options.num_new) for n in run.options.clients]


def _turn(run: Run, name: str) -> dict[str, Any]:
    asked = [dataclasses.asdict(workload) for workload in workloads(run)]
    if ENGINES[name].label != OURS:
        limits = run.limits(max(run.options.clients), LONGEST + run.options.num_new)
        found = run.bench.work(name, do="serve", limits=limits, workloads=asked)
        run.versions |= found["versions"]
        return found
    with run.triton(name).running() as triton:
        found = run.process("benchmarks.serving.load", {"url": triton.grpc_url, "model": MODEL, "workloads": asked})
        return {**found, "served_by": "Triton, gRPC streams", "peak_rss_bytes": peak_rss_bytes(triton.stub().pid)}


def _summarised(run: Run, turns: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Medians of every engine; one that computes in fp32 but writes something else is left out."""
    reference = next((turns[name] for name in (f"{OURS}-fp32", *turns) if name in turns), None)
    engines = {}
    for name, found in turns.items():
        assert reference is not None
        spec = ENGINES[name]
        same = _agreement(found[0]["runs"], reference[0]["runs"])
        with run.bench.leaving_out(name, run.absent):
            if spec.precision == "fp32" and same["equal_tokens"] < MIN_EQUAL_TOKENS * same["tokens"]:
                raise Failed(f"in fp32 its greedy tokens are not those of llmos: {same}")
            engines[name] = {
                "label": spec.label,
                "precision": spec.precision,
                "served_by": found[0]["served_by"],
                "agreement": same,
                "peak_rss_bytes": max(turn["peak_rss_bytes"] for turn in found),
                "clients": {
                    str(n): figures.over_rounds([figures.of_run(_answers(turn["runs"][i])) for turn in found])
                    for i, n in enumerate(run.options.clients)
                },
            }
    return engines


def _answers(run: Sequence[dict[str, Any]]) -> list[Answer]:
    return [Answer(**answer) for answer in run]


def _agreement(runs: Sequence[Any], reference: Sequence[Any]) -> dict[str, int]:
    """Over all numbers of clients; whoever answered more waves is compared on the first ones."""
    pairs = [pair for found, others in zip(runs, reference, strict=True) for pair in zip(found, others, strict=False)]
    return figures.agreement([found["tokens"] for found, _ in pairs], [other["tokens"] for _, other in pairs])


def _note(run: Run) -> str:
    options = run.options
    return (
        f"Medians of {options.rounds} interleaved round(s), every engine in a process of its own, threads: "
        f"{options.num_threads}. Each of n clients sends {options.waves} request(s), the next as soon as the last is "
        "answered (1 where an engine runs static batches: all of them take the same time). Prompts of "
        f"{SHORTEST}–{LONGEST} tokens, {options.num_new} greedy tokens out. llmos is asked through Triton by a load "
        "generator that shares its cores; the others are asked inside their own process. TTFT: from sending to the "
        "first token. ITL: between two tokens of an answer."
    )
