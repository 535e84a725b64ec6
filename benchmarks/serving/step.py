"""Time of an engine step outside the graph: 32 rows, a vocabulary of 152 k, top-p sampling.

The engine's own classes run in a process without Triton, with timers put around their methods; the model is small, so
that what is measured is not hidden, and the vocabulary is a large model's. The time between two steps that decode all
rows is the step's; what is not spent in the graph is the engine's, whatever it does. As a fraction it is given of
steps of the 135 M model, whose graph is timed bare, because of a toy's step it would say nothing.
"""

from __future__ import annotations

import itertools
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import checkpoint as checkpoints
from benchmarks.bench import CACHE, Bench
from benchmarks.engines import OURS
from benchmarks.serving.report import table
from benchmarks.serving.run import Run
from benchmarks.serving.workload import Workload

KIND = "Engine time per step"
NUM_ROWS, NUM_NEW = 32, 64
CONFIG = {
    **checkpoints.CONFIG,
    "vocab_size": 151_936,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
# Logits of the seeded model have a standard deviation of 0.64: at temperature 0.13 it is 5, which leaves a nucleus of
# tens of tokens, as in a trained model; at 1 the nucleus is most of the vocabulary, the worst that sampling can meet.
SAMPLING = {
    "greedy": {"temperature": 0},
    "top_p 0.9": {"temperature": 0.13, "top_p": 0.9},
    "top_p 0.9, flat": {"temperature": 1.0, "top_p": 0.9},
}
WANTED = 0.05
PARTS = ("graph", "schedule", "sample", "append", "update", "receive")


def measure(run: Run) -> dict[str, Any]:
    bench = Bench(_checkpoint(), run.options.num_threads, run.bench.console)
    name = f"{OURS}-fp32"
    bench.prepare(name)
    task = {
        "folder": str(bench.folder_of(name)),
        "num_rows": NUM_ROWS,
        "num_new": 16 if run.options.quick else NUM_NEW,
        "num_threads": run.options.num_threads,
    }
    bare_ms = {precision: _bare_step_ms(run, f"bare-{precision}") for precision in ("fp32", "int8")}
    found = {}
    for title, sampling in SAMPLING.items():
        run.bench.say(f"engine steps: {title}")
        found[title] = run.process("benchmarks.serving.engine_steps", {**task, "sampling": sampling})
    return {
        "steps": found,
        "bare_step_ms": bare_ms,
        "tables": [_fractions(found, bare_ms), _parts(found)],
        "notes": [f"{NUM_ROWS} rows, vocabulary {CONFIG['vocab_size']}; medians over steps that decode every row."],
    }


def _checkpoint() -> Path:
    return checkpoints.make(CACHE / checkpoints.name(CONFIG), CONFIG)


def _bare_step_ms(run: Run, name: str) -> float:
    """A decode step of the measured model's graph with as many rows."""
    workload = Workload(run.vocab_size, NUM_ROWS, 1, 16, shortest=64, longest=64)
    run.bench.prepare(name)
    limits = run.limits(NUM_ROWS, 64 + workload.num_new)
    (answers,) = run.bench.work(name, do="serve", limits=limits, workloads=[asdict(workload)])["runs"]
    return 1e3 * statistics.median(b - a for a, b in itertools.pairwise(answers[-1]["times_s"]))


def _fractions(found: dict[str, dict[str, float]], bare_ms: dict[str, float]) -> dict[str, Any]:
    columns = ["what", "outside the graph ms", "graph ms", "fraction of it"]
    columns += [f"fraction beside {ms:.1f} ms of {precision}" for precision, ms in bare_ms.items()]
    lines = []
    for title, times in found.items():
        outside, graph = times["step"] - times["graph"], times["graph"]
        fractions = [outside / (outside + ms) for ms in (graph, *bare_ms.values())]
        lines.append([title, outside, graph, *(round(fraction, 4) for fraction in fractions)])
    return table(
        "Outside the graph", columns, lines, f"Fractions of a step between 0 and 1; at most {WANTED} is wanted."
    )


def _parts(found: dict[str, dict[str, float]]) -> dict[str, Any]:
    titles = ["step", *PARTS]
    lines = [[title, *(times.get(part) for part in titles)] for title, times in found.items()]
    return table("Parts of a step, ms", ["what", *titles], lines, "Text is decoded between sampling and update.")
