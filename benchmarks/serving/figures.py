"""From answers to numbers: throughput, times to the first token and between tokens, agreement, ratios.

Pure functions over ``Answer``; standard library only. One run of one engine with n clients becomes

    {"tokens_per_s": …, "ttft_ms": {"p50", "p95"}, "itl_ms": {"p50", "p95"}}

and the runs of several rounds become the same with medians, plus ``rounds_tokens_per_s``. TTFT is from the client's
sending to the first token, ITL the gap between two tokens of one answer, over all answers of the run.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.engines.closed_loop import Answer

Figures = dict[str, Any]


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the nearest ranks, as NumPy's default."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def gaps_s(answers: Sequence[Answer]) -> list[float]:
    """Times between two tokens of the same answer."""
    return [later - earlier for answer in answers for earlier, later in itertools.pairwise(answer.times_s)]


def of_run(answers: Sequence[Answer]) -> Figures:
    """The figures of one run: output tokens are counted from the first request to the last token."""
    num_tokens = sum(len(answer.tokens) for answer in answers)
    begin_s = min(answer.sent_s for answer in answers)
    end_s = max(answer.times_s[-1] for answer in answers)
    return {
        "tokens_per_s": num_tokens / (end_s - begin_s),
        "ttft_ms": spread_ms([answer.times_s[0] - answer.sent_s for answer in answers]),
        "itl_ms": spread_ms(gaps_s(answers)),
    }


def spread_ms(values_s: Sequence[float]) -> dict[str, float]:
    return {f"p{percent}": 1e3 * percentile(values_s, percent) for percent in (50, 95)}


def over_rounds(runs: Sequence[Figures]) -> Figures:
    """Median of every figure over the rounds."""
    return {**_medians(runs), "rounds_tokens_per_s": [run["tokens_per_s"] for run in runs]}


def _medians(runs: Sequence[Mapping[str, Any]]) -> Figures:
    return {
        name: _medians([run[name] for run in runs])
        if isinstance(value, Mapping)
        else statistics.median(run[name] for run in runs)
        for name, value in runs[0].items()
    }


def agreement(texts: Sequence[Sequence[int]], reference: Sequence[Sequence[int]]) -> dict[str, int]:
    """How many answers are the reference's, and how many tokens come before each answer's first difference."""
    same = [_common(text, other) for text, other in zip(texts, reference, strict=True)]
    return {
        "answers": len(texts),
        "equal_answers": sum(common == len(other) for common, other in zip(same, reference, strict=True)),
        "tokens": sum(map(len, reference)),
        "equal_tokens": sum(same),
    }


def _common(text: Sequence[int], other: Sequence[int]) -> int:
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(text, other, strict=False))
    return sum(1 for _ in pairs)


def best(engines: Mapping[str, Mapping[str, Any]], clients: str) -> str:
    """The name of the engine that makes the most tokens a second for so many clients."""
    return max(engines, key=lambda name: engines[name]["clients"][clients]["tokens_per_s"])


def add_ratios(engines: Mapping[str, Mapping[str, Any]], ours: str) -> None:
    """Give every number of clients its ``ratio``: tokens a second divided by ours with the same kind of weights.

    fp32 is compared with ours in fp32, all smaller weights with ours in int8; None where that was not measured.
    """
    for engine in engines.values():
        baseline = engines.get(f"{ours}-{'fp32' if engine['precision'] == 'fp32' else 'int8'}")
        for clients, found in engine["clients"].items():
            found["ratio"] = (
                found["tokens_per_s"] / baseline["clients"][clients]["tokens_per_s"] if baseline is not None else None
            )
