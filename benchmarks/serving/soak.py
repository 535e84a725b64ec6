"""1,000 mixed requests through 32 rows: is every answer the request's own, is every row given back, is memory flat?

All answers are checked against what they asked for; some are asked for again, alone, and must be the same to the token.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from typing import Any

import psutil

from benchmarks.engines import OURS
from benchmarks.serving.load import Call, Reply, ask_all
from benchmarks.serving.report import table
from benchmarks.serving.run import Run
from benchmarks.serving.soak_requests import KINDS, problems, requests, texts
from benchmarks.serving.triton import MODEL, Triton

KIND = "Soak"
NUM_CLIENTS = 64
"""Twice as many as there are rows, so that requests wait."""
NUM_AGAIN = 50
NUM_MARKS = 10
WARM_UP_MARKS = 3
"""Marks after which every row has been used to its full length and memory should stay as it is."""
SETTLE_S = 5.0


def measure(run: Run) -> dict[str, Any]:
    name = f"{OURS}-{run.options.precision}"
    asked = requests(run.vocab_size, run.options.num_requests)
    calls = [call for _, call in asked]
    with run.triton(name).running() as triton:
        memory = Memory(triton.stub(), len(calls))
        run.bench.say(f"{len(calls)} requests by {NUM_CLIENTS} clients")
        started_s = time.perf_counter()
        replies = asyncio.run(ask_all(triton.grpc_url, MODEL, calls, NUM_CLIENTS, memory.mark))
        seconds = time.perf_counter() - started_s
        gauges = settled(triton.gauge)
        again = _again(run, triton, calls, replies)
    wrong = {i: said for i, call in enumerate(calls) if (said := problems(call, replies[i]))}
    found = {
        "precision": run.options.precision,
        "seconds": seconds,
        "num_tokens": sum(len(text.token_ids) for reply in replies for text in texts(reply)),
        "rss_bytes": memory.rss_bytes,
        "rss_growth_bytes": memory.growth_bytes,
        "gauges": gauges,
        "asked_again": len(again),
        "different_alone": [index for index, is_same in again.items() if not is_same],
        "problems": {str(i): [asked[i][0], *said] for i, said in wrong.items()},
    }
    names = [kind for kind, _ in asked]
    return {"soak": found, "tables": [_verdict(found), _kinds(names, wrong, again)], "notes": [_memory_note(found)]}


class Memory:
    """Resident memory of the stub, noted at every tenth of the requests."""

    def __init__(self, stub: psutil.Process, num_requests: int) -> None:
        self._stub = stub
        self._every = max(1, num_requests // NUM_MARKS)
        self.rss_bytes = [stub.memory_info().rss]

    def mark(self, num_answered: int) -> None:
        if num_answered % self._every == 0:
            self.rss_bytes.append(self._stub.memory_info().rss)

    @property
    def growth_bytes(self) -> int:
        """Since every row was used."""
        return self.rss_bytes[-1] - self.rss_bytes[min(WARM_UP_MARKS, len(self.rss_bytes) - 1)]


def settled(gauge: Callable[[str], float]) -> dict[str, float]:
    """How many requests the engine still holds; a cancelled one may take a moment to go."""
    deadline_s = time.monotonic() + SETTLE_S
    while True:
        found = {name: gauge(f"vllm:num_requests_{name}") for name in ("running", "waiting")}
        if not any(found.values()) or time.monotonic() > deadline_s:
            return found
        time.sleep(0.05)


def _again(run: Run, triton: Triton, calls: list[Call], replies: list[Reply]) -> dict[int, bool]:
    """Whether a request alone gives what it gave among others, for a sample of them."""
    whole = [index for index, call in enumerate(calls) if not call.cancel_after and not replies[index].error]
    sample = sorted(random.Random("again").sample(whole, min(NUM_AGAIN, len(whole))))
    run.bench.say(f"{len(sample)} of them again, one after the other")
    alone = asyncio.run(ask_all(triton.grpc_url, MODEL, [calls[index] for index in sample], num_clients=1))
    return {index: texts(reply) == texts(replies[index]) for index, reply in zip(sample, alone, strict=True)}


def _verdict(found: dict[str, Any]) -> dict[str, Any]:
    num_wrong, num_different = len(found["problems"]), len(found["different_alone"])
    growth_mib = found["rss_growth_bytes"] / 2**20
    held = sum(found["gauges"].values())
    lines = [
        ["answers that are wrong", num_wrong, num_wrong == 0],
        [f"answers that differ when asked for alone, of {found['asked_again']}", num_different, num_different == 0],
        ["requests still held afterwards", int(held), held == 0],
        ["growth of the model's process, MiB", growth_mib, growth_mib < 16],
        ["tokens a second", found["num_tokens"] / found["seconds"], None],
    ]
    return table(f"Soak, {OURS} {found['precision']}", ["what", "found", "as it should be"], lines)


def _kinds(names: list[str], wrong: dict[int, list[str]], again: dict[int, bool]) -> dict[str, Any]:
    lines = []
    for kind in KINDS:
        mine = [index for index, name in enumerate(names) if name == kind]
        repeated = [again[index] for index in mine if index in again]
        first = next((wrong[index][0] for index in mine if index in wrong), "")
        lines.append([kind, len(mine), sum(i in wrong for i in mine), f"{sum(repeated)}/{len(repeated)}", first])
    return table("By kind", ["kind", "requests", "wrong", "same alone", "first problem"], lines)


def _memory_note(found: dict[str, Any]) -> str:
    marks = ", ".join(f"{rss / 2**20:.0f}" for rss in found["rss_bytes"])
    return f"Resident memory of the model's process before and after every tenth of the requests, MiB: {marks}."
