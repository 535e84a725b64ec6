"""A long prompt arrives beside running streams: how much longer do they wait for their next token?

Undisturbed and disturbed rounds take turns, every one with prompts of its own, so that no prefix is cached. The long
prompt is sent once all streams run; gaps between tokens are compared while all streams run:

    streams   ──prefill──┬─ LEAD tokens each ─┬────────────── watched ──────────────┬── the first stream ends
    prompt                                    └─sent ── its chunks ── first token
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import tritonclient.grpc.aio as triton_aio

from benchmarks.bench import Failed
from benchmarks.checkpoint import random_prompts
from benchmarks.engines import OURS
from benchmarks.engines.closed_loop import Answer
from benchmarks.serving.figures import percentile
from benchmarks.serving.load import Reply, ask, greedy
from benchmarks.serving.report import table
from benchmarks.serving.run import Run
from benchmarks.serving.triton import MODEL
from benchmarks.serving.workload import Workload

KIND = "A long prompt beside running streams"
NUM_STREAMS = 8
STREAM_TOKENS = 192
LEAD = 16
LONG_PROMPT_TOKENS, LONG_NEW_TOKENS = 2000, 8
WANTED = 1.5


def measure(run: Run) -> dict[str, Any]:
    name = f"{OURS}-{run.options.precision}"
    order = [
        (f"round {number + 1} of {run.options.rounds}: {'with' if is_disturbed else 'without'} the prompt", each)
        for number in range(run.options.rounds)
        for each in ((number, False), (number, True))
        for is_disturbed in (each[1],)
    ]
    rounds: dict[bool, list[dict[str, float]]] = {False: [], True: []}
    with run.triton(name).running() as triton:
        for number, is_disturbed in run.progress(order, len(order)):
            rounds[is_disturbed].append(_round(run.vocab_size, triton.grpc_url, number, is_disturbed))
    lines = _lines(rounds)
    columns = ["what", "ITL p50 ms", "ITL p95 ms", "ITL max ms", "p95 ratio"]
    text = (
        f"{NUM_STREAMS} streams of {STREAM_TOKENS} tokens, {name}; a prompt of {LONG_PROMPT_TOKENS} tokens. Medians of "
        f"{run.options.rounds} round(s). Ratio: p95 divided by that without the prompt; at most {WANTED} is wanted."
    )
    return {
        "rounds": {str(k): v for k, v in rounds.items()},
        "tables": [table("ITL", columns, lines, text)],
        "notes": [],
    }


def _round(vocab_size: int, url: str, number: int, is_disturbed: bool) -> dict[str, float]:
    streams = Workload(vocab_size, NUM_STREAMS, 1, STREAM_TOKENS, seed=100 + 2 * number + is_disturbed)
    (long_prompt,) = random_prompts(vocab_size, 1, LONG_PROMPT_TOKENS, seed=200 + number)
    replies, long_reply = asyncio.run(_streams(url, streams, long_prompt if is_disturbed else None))
    for reply in (*replies, long_reply):
        if reply.error:
            raise Failed(reply.error)
    return watched([reply.answer for reply in replies], long_reply.answer if is_disturbed else None)


async def _streams(url: str, workload: Workload, long_prompt: Sequence[int] | None) -> tuple[list[Reply], Reply]:
    replies = [Reply() for _ in workload.prompts]
    long_reply = Reply()
    async with triton_aio.InferenceServerClient(url) as client:
        calls = [greedy(prompt, workload.num_new) for prompt in workload.prompts]
        tasks = [
            asyncio.create_task(ask(client, MODEL, call, reply)) for call, reply in zip(calls, replies, strict=True)
        ]
        if long_prompt is not None:
            while min(len(reply.times_s) for reply in replies) < LEAD and not all(task.done() for task in tasks):
                await asyncio.sleep(0.002)
            await ask(client, MODEL, greedy(long_prompt, LONG_NEW_TOKENS), long_reply)
        await asyncio.gather(*tasks)
    return replies, long_reply


def watched(streams: Sequence[Answer], long: Answer | None) -> dict[str, float]:
    """ITL of the streams while all of them run; also of the gaps that lie within or reach into the prompt's prefill."""
    begin_s = max(answer.times_s[LEAD - 1] for answer in streams)
    end_s = min(answer.times_s[-1] for answer in streams)
    gaps = [
        (earlier, later)
        for answer in streams
        for earlier, later in zip(answer.times_s, answer.times_s[1:], strict=False)
        if begin_s <= earlier and later <= end_s
    ]
    found = _spread("all", gaps)
    if long is not None:
        found["ttft_ms"] = 1e3 * (long.times_s[0] - long.sent_s)
        found |= _spread("meanwhile", [gap for gap in gaps if gap[1] > long.sent_s and gap[0] < long.times_s[0]])
    return found


def _spread(name: str, gaps: Sequence[tuple[float, float]]) -> dict[str, float]:
    times_ms = [1e3 * (later - earlier) for earlier, later in gaps] or [float("nan")]
    return {
        f"{name}_p50": percentile(times_ms, 50),
        f"{name}_p95": percentile(times_ms, 95),
        f"{name}_max": max(times_ms),
    }


def _lines(rounds: dict[bool, list[dict[str, float]]]) -> list[list[Any]]:
    def median(is_disturbed: bool, name: str) -> float:
        return percentile([found[name] for found in rounds[is_disturbed]], 50)

    base = median(False, "all_p95")
    lines: list[list[Any]] = []
    for title, is_disturbed, name in (
        ("without the prompt", False, "all"),
        ("with the prompt, whole run", True, "all"),
        ("with the prompt, while it is computed", True, "meanwhile"),
    ):
        spread = [median(is_disturbed, f"{name}_{kind}") for kind in ("p50", "p95", "max")]
        lines.append([title, *spread, spread[1] / base])
    return [*lines, ["TTFT of the long prompt", median(True, "ttft_ms"), None, None, None]]
