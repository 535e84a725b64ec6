"""Beam search of width 4, eight requests at once: the decoder, then an encoder–decoder of T5-small's shape.

llmos gets eight concurrent requests through Triton, each with ``beam_width``; peers get the eight prompts as one batch,
which is the most that they can make of them. Every answer has the same number of tokens; the best beams are compared
with those of transformers.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import statistics
import time
from typing import Any

from benchmarks import checkpoint as checkpoints
from benchmarks import environment
from benchmarks.bench import CACHE, Bench, Failed, rotated
from benchmarks.engines import ENGINES, OURS, REFERENCE
from benchmarks.serving.figures import agreement
from benchmarks.serving.load import Call, ask_all
from benchmarks.serving.report import table
from benchmarks.serving.run import Run
from benchmarks.serving.triton import MODEL
from benchmarks.serving.workload import LONGEST, Workload

KIND = "Beam search"
WIDTH = 4
NUM_REQUESTS = 8
ASKED = ("llmos-fp32", "llmos-int8", "transformers-sdpa", "ctranslate2-fp32", "ctranslate2-int8")


def measure(run: Run) -> dict[str, Any]:
    environment.ensure()
    names = [name for name in ASKED if name in run.options.engines]
    seq2seq = checkpoints.make(CACHE / checkpoints.name(checkpoints.SEQ2SEQ_CONFIG), checkpoints.SEQ2SEQ_CONFIG)
    found = {
        "decoder": _measure(run, run.bench, names),
        "encoder–decoder": _measure(run, Bench(seq2seq, run.options.num_threads, run.bench.console), names),
    }
    text = f"{NUM_REQUESTS} requests at once, width {WIDTH}, {run.options.num_new} tokens of each best beam. " + (
        "Ratio: seconds divided by those of llmos with the same weights; above 1 is slower than llmos. Wanted of "
        "llmos: a third of transformers' seconds for the decoder, two thirds of CTranslate2's for the encoder–decoder."
    )
    return {
        "beams": found,
        "tables": [table(title, COLUMNS, _lines(engines), text) for title, engines in found.items()],
        "notes": [f"Medians of {run.options.rounds} interleaved round(s), every engine in a process of its own."],
    }


COLUMNS = ["engine", "weights", "seconds", "tokens/s", "ratio", "equal answers", "equal tokens"]


def _measure(run: Run, bench: Bench, names: list[str]) -> dict[str, dict[str, Any]]:
    config = json.loads((bench.checkpoint / "config.json").read_text(encoding="utf-8"))
    workload = Workload(config["vocab_size"], NUM_REQUESTS, 1, run.options.num_new, seed=400)
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    absent: dict[str, str] = {}
    for number in range(run.options.rounds):
        for name in rotated(names, number):
            if name not in absent:
                bench.say(f"{bench.checkpoint.name}, round {number + 1} of {run.options.rounds}: {name}")
                with bench.leaving_out(name, absent):
                    bench.prepare(name)
                    turns[name].append(_turn(run, bench, name, workload))
    run.absent |= {f"{name} of {bench.checkpoint.name}": reason for name, reason in absent.items()}
    return _summarised({name: found for name, found in turns.items() if found and name not in absent}, workload)


def _turn(run: Run, bench: Bench, name: str, workload: Workload) -> dict[str, Any]:
    if ENGINES[name].label == OURS:
        with run.triton(name, bench).running() as triton:
            _ask(triton.grpc_url, workload.warm_up)
            return _ask(triton.grpc_url, workload)
    limits = run.limits(NUM_REQUESTS * WIDTH, LONGEST + workload.num_new)
    asked = dataclasses.asdict(workload)
    found = bench.work(name, do="beam", limits=limits, workload=asked, width=WIDTH, repeats=1)
    run.versions |= found["versions"]
    return found


def _ask(url: str, workload: Workload) -> dict[str, Any]:
    sampling = {"beam_width": WIDTH, "max_tokens": workload.num_new, "ignore_eos": True}
    calls = [Call(tuple(prompt), sampling, stream=False) for prompt in workload.prompts]
    started_s = time.perf_counter()
    replies = asyncio.run(ask_all(url, MODEL, calls, NUM_REQUESTS))
    seconds = time.perf_counter() - started_s
    refused = next((reply.error for reply in replies if reply.error), "")
    if refused:
        raise Failed(refused)
    return {"seconds": [seconds], "tokens": [reply.token_ids for reply in replies]}


def _summarised(turns: dict[str, list[dict[str, Any]]], workload: Workload) -> dict[str, dict[str, Any]]:
    reference = turns.get(REFERENCE)
    engines: dict[str, dict[str, Any]] = {}
    for name, found in turns.items():
        seconds = [second for turn in found for second in turn["seconds"]]
        engines[name] = {
            "seconds": statistics.median(seconds),
            "rounds_seconds": seconds,
            "tokens_per_s": NUM_REQUESTS * workload.num_new / statistics.median(seconds),
            "agreement": agreement(found[0]["tokens"], reference[0]["tokens"]) if reference else None,
        }
    for name, engine in engines.items():
        ours = engines.get(f"{OURS}-{ENGINES[name].precision}")
        engine["ratio"] = engine["seconds"] / ours["seconds"] if ours else None
    return engines


def _lines(engines: dict[str, dict[str, Any]]) -> list[list[Any]]:
    lines = []
    for name, engine in engines.items():
        same = engine["agreement"]
        equal = [f"{same[f'equal_{n}']}/{same[n]}" for n in ("answers", "tokens")] if same else [None, None]
        spec = ENGINES[name]
        lines.append([spec.label, spec.precision, engine["seconds"], engine["tokens_per_s"], engine["ratio"], *equal])
    return lines
