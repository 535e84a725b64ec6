"""Percentiles out of a few buckets are near those of the values themselves; figures say what they are of."""

from __future__ import annotations

import random

import pytest

from control_plane.traffic.counts import BOUNDS_S, END, FIRST_TOKEN, Observation, buckets, figures, quantile, total_of

pytestmark = pytest.mark.unit


def observation(outcome: str = "ok", tokens: int = 10, first_token_s: float | None = 0.1, end_s: float = 1.0):
    return Observation("chat", 1, outcome, 5, tokens, first_token_s, end_s)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
def test_a_percentile_lies_in_the_bucket_of_the_exact_one(share):
    rng = random.Random(1)
    times = sorted(rng.lognormvariate(-1, 1.2) for _ in range(5000))
    counts = total_of(observation(first_token_s=seconds).counts for seconds in times)
    exact, found = times[int(share * len(times))], quantile(buckets(counts, FIRST_TOKEN), share)
    assert found is not None and found == pytest.approx(exact, rel=0.1)


def test_what_is_longer_than_every_bound_is_the_last_bound_and_no_data_is_none():
    counts = observation(first_token_s=10_000.0).counts
    assert quantile(buckets(counts, FIRST_TOKEN), 0.5) == BOUNDS_S[-1]
    assert quantile(buckets({}, END), 0.5) is None


def test_what_a_client_did_wrong_is_no_error_of_the_version():
    faults = ["client_gone", "client_timeout", "invalid_request", "invalid_api_key", "invalid_session", "forbidden"]
    outcomes = ["ok", "ok", "ok", *faults, "serving_error"]
    found = figures(total_of(observation(outcome).counts for outcome in outcomes), 10.0)
    assert found.errors == dict.fromkeys([*faults, "serving_error"], 1)
    assert (found.requests, found.requests_per_s, found.error_share) == (10, 1.0, 0.1)


def test_tokens_per_second_are_of_answered_requests():
    slow = observation("timeout", tokens=7, end_s=600.0)
    found = figures(total_of([observation(tokens=30, end_s=1.0).counts, slow.counts]), 60.0)
    assert (found.tokens_per_s, found.completion_tokens, found.prompt_tokens) == (30.0, 37, 10)
    assert found.end_p95_s is not None and found.end_p95_s < 2


def test_nothing_counted_is_nothing_said():
    found = figures({}, 60.0)
    assert (found.requests, found.error_share, found.tokens_per_s, found.first_token_p50_s) == (0, None, None, None)
