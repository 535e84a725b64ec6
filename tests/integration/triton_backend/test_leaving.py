"""A client may leave, and a deadline may pass, at every stage; overload is told at once; nothing leaks."""

from __future__ import annotations

import random
import time

import pytest

pytestmark = pytest.mark.integration

LONG = {"max_tokens": 250, "ignore_eos": True}
KINDS = [{}, {"n": 3, "temperature": 1.0}, {"beam_width": 4}, {"structured_outputs": {"regex": "[a-z]+"}}, {"n": 8}]


def fill(client):
    """Every row is taken by requests that run for a while, and many more wait."""
    answers = [client.submit([5, i], **LONG) for i in range(48)]
    while client.engine._scheduler.num_running < 8:
        time.sleep(0.001)
    return answers


def leave(answers):
    for answer in answers:
        answer.gone = True
    return [answer.last() for answer in answers]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_client_that_leaves_while_it_waits_costs_nothing(client, kind):
    running = fill(client)
    waiting = client.submit([7], **LONG, **kind)
    waiting.gone = True
    assert waiting.last().error == "CANCELLED: the client cancelled the request"
    leave(running)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("num_tokens", [0, 1, 20])
def test_a_client_that_leaves_in_prefill_or_decode_frees_its_rows(client, kind, num_tokens):
    answer = client.submit([7] * 200, stream=True, **LONG, **kind)
    if "beam_width" not in kind:
        for _ in range(num_tokens):
            next(iter(answer))
    answer.gone = True
    last = list(answer)[-1]
    assert last.finished
    while client.engine._scheduler.has_work:
        time.sleep(0.001)
    assert client.engine._scheduler._cache.num_used == 0


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_deadline_passes_while_a_request_waits_or_runs(client, kind):
    running = fill(client)
    waiting = client.submit([7], timeout_ms=30, **LONG, **kind)
    assert waiting.last().error == "CANCELLED: timeout_ms = 30 has passed"
    leave(running)
    assert client.ask([7], timeout_ms=20, **LONG, **kind).error == "CANCELLED: timeout_ms = 20 has passed"


def test_a_client_that_leaves_at_its_last_token_is_never_answered_twice(client):
    for max_tokens in (1, 2, 3):
        for delay_ms in range(6):
            answer = client.submit([5, 6], max_tokens=max_tokens, stream=True, ignore_eos=True)
            time.sleep(delay_ms / 1000)
            answer.gone = True
            assert answer.last().finished
    assert not client.engine._scheduler.has_work


def test_a_preempted_request_whose_client_leaves_gives_back_what_was_saved(client):
    patient = [client.submit([5, i], priority=5, **LONG) for i in range(8)]
    while client.engine._scheduler.num_running < 8:
        time.sleep(0.001)
    urgent = client.submit([9], n=8, priority=0, temperature=1.0, **LONG)
    while not client.engine._saved:
        time.sleep(0.001)
    leave(patient)
    assert not client.engine._saved
    leave([urgent])


def test_ten_times_more_requests_than_fit_are_answered_or_refused_at_once(client):
    draw = random.Random(1)
    started_s, answers, refused = time.monotonic(), [], 0
    while time.monotonic() - started_s < 5:
        kind = draw.choice(KINDS)
        answers.append(client.submit([5, draw.randrange(1, 400)], max_tokens=draw.randint(1, 60), **kind))
        if draw.random() < 0.1:
            draw.choice(answers).gone = True
        if len(answers) % 50 == 0:
            time.sleep(0.01)
    for answer in answers:
        error = answer.last().error
        refused += (error or "").startswith("UNAVAILABLE: ")
        assert error is None or error.startswith(("UNAVAILABLE: ", "CANCELLED: "))
    assert 0 < refused < len(answers)
    assert client.engine._scheduler._cache.num_used == 0 and not client.engine._outputs
