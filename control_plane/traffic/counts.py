"""What is counted of a request, and what counts tell. Pure: no clock, no Redis.

Counts are flat, whole numbers by field, so that adding them up is the same in memory and in a Redis hash:

    outcome.ok  outcome.<code of the error>      requests
    prompt_tokens  completion_tokens             tokens
    first_token.0 … first_token.15               requests by the bucket of their time to the first token
    end.0 … end.15                               the same of the time to the end, of requests that were answered
    first_token.us  end.us  end.tokens           microseconds and tokens of those that are in the buckets
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

BOUNDS_S = tuple(round(0.02 * 2**exponent, 2) for exponent in range(15))
"""Upper bounds of the buckets, 0.02 … 327.68 seconds; one more bucket takes what is longer."""
OK, CLIENT_GONE = "ok", "client_gone"
FAULTS_OF_CLIENTS = (
    CLIENT_GONE,
    "client_timeout",
    "invalid_request",
    "invalid_api_key",
    "invalid_session",
    "forbidden",
)
"""Outcomes that say nothing against a version."""
FIRST_TOKEN, END = "first_token", "end"

Counts = Mapping[str, int]


@dataclass(frozen=True)
class Observation:
    """One request that has ended. ``outcome`` is ok or the code of its error; times are since its arrival."""

    model: str
    version: int
    outcome: str
    prompt_tokens: int
    completion_tokens: int
    first_token_s: float | None
    end_s: float

    @property
    def counts(self) -> dict[str, int]:
        found = {
            f"outcome.{self.outcome}": 1,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
        }
        if self.first_token_s is not None:
            found |= _timed(FIRST_TOKEN, self.first_token_s)
        if self.outcome == OK:
            found |= {**_timed(END, self.end_s), "end.tokens": self.completion_tokens}
        return found


@dataclass(frozen=True)
class Figures:
    """What the counts of ``seconds`` mean. ``error_share`` is from 0 to 1, without what clients did wrong themselves.

    Percentiles are interpolated inside a bucket. ``tokens_per_s`` is how fast one request was answered. None: no data.
    """

    requests: int
    requests_per_s: float
    errors: Mapping[str, int]
    error_share: float | None
    prompt_tokens: int
    completion_tokens: int
    first_token_p50_s: float | None
    first_token_p95_s: float | None
    end_p50_s: float | None
    end_p95_s: float | None
    tokens_per_s: float | None


def add(total: dict[str, int], counts: Counts) -> None:
    for field, value in counts.items():
        total[field] = total.get(field, 0) + value


def total_of(parts: Iterable[Counts]) -> dict[str, int]:
    total: dict[str, int] = {}
    for counts in parts:
        add(total, counts)
    return total


def outcomes(counts: Counts) -> dict[str, int]:
    prefix = "outcome."
    return {name.removeprefix(prefix): n for name, n in sorted(counts.items()) if name.startswith(prefix)}


def buckets(counts: Counts, name: str) -> list[int]:
    """Requests per bucket; the last one has no upper bound."""
    return [counts.get(f"{name}.{index}", 0) for index in range(len(BOUNDS_S) + 1)]


def figures(counts: Counts, seconds: float) -> Figures:
    found = outcomes(counts)
    requests = sum(found.values())
    errors = {code: number for code, number in found.items() if code != OK}
    faults = sum(number for code, number in errors.items() if code not in FAULTS_OF_CLIENTS)
    busy_us = counts.get("end.us", 0)
    return Figures(
        requests=requests,
        requests_per_s=requests / seconds,
        errors=errors,
        error_share=faults / requests if requests else None,
        prompt_tokens=counts.get("prompt_tokens", 0),
        completion_tokens=counts.get("completion_tokens", 0),
        first_token_p50_s=quantile(buckets(counts, FIRST_TOKEN), 0.5),
        first_token_p95_s=quantile(buckets(counts, FIRST_TOKEN), 0.95),
        end_p50_s=quantile(buckets(counts, END), 0.5),
        end_p95_s=quantile(buckets(counts, END), 0.95),
        tokens_per_s=counts.get("end.tokens", 0) * 1e6 / busy_us if busy_us else None,
    )


def quantile(numbers: list[int], share: float) -> float | None:
    """As Prometheus' histogram_quantile: even inside a bucket; the last bound for what is beyond all."""
    rank = share * sum(numbers)
    if not rank:
        return None
    below = 0
    for index, number in enumerate(numbers[:-1]):
        if number and below + number >= rank:
            low = BOUNDS_S[index - 1] if index else 0.0
            return low + (BOUNDS_S[index] - low) * (rank - below) / number
        below += number
    return BOUNDS_S[-1]


def _timed(name: str, seconds: float) -> dict[str, int]:
    return {f"{name}.{bisect_left(BOUNDS_S, seconds)}": 1, f"{name}.us": round(seconds * 1e6)}
