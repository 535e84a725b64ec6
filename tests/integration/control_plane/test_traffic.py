"""Counts of the gateway in a real Redis: they survive the web process, wait while Redis is away, and cost little."""

from __future__ import annotations

import time

import pytest
import redis

from control_plane.registry import deployments, services
from control_plane.traffic.counts import Observation, total_of
from control_plane.traffic.recorder import HOUR_S, MINUTE_S, Slot, TrafficRecorder
from control_plane.traffic.services import compare
from tests.unit.control_plane.registry.conftest import sealed

from .processes import Redis, wait_for

pytestmark = pytest.mark.integration
SEEN = Observation("chat", 1, "ok", 5, 10, 0.1, 1.0)


@pytest.fixture
def recorder(settings, redis_process) -> TrafficRecorder:
    return TrafficRecorder(settings.redis_url)


def stored(recorder: TrafficRecorder, length_s: int = MINUTE_S) -> int | None:
    """Requests of the last two stretches of time that Redis knows."""
    now = int(time.time()) // length_s
    found = recorder.read(Slot("chat", 1, length_s, index) for index in (now - 1, now))
    return None if found is None else total_of(found.values()).get("outcome.ok", 0)


def test_counts_reach_redis_by_themselves_and_survive_the_web_process(settings, recorder):
    for _ in range(100):
        recorder.record(SEEN)
    wait_for(lambda: stored(recorder) == 100, 5, "flush")
    assert recorder.pending() == {}
    successor = TrafficRecorder(settings.redis_url)
    successor.record(SEEN)
    assert successor.flush() and (stored(successor), stored(successor, HOUR_S)) == (101, 101)


def test_counts_wait_while_redis_is_away(recorder, redis_process: Redis):
    recorder.record(SEEN)
    assert recorder.flush()
    redis_process.stop()
    for _ in range(10):
        recorder.record(SEEN)
    assert not recorder.flush() and stored(recorder) is None
    redis_process.start()
    assert recorder.flush() and stored(recorder) == 10, "what Redis held went with it, what waited did not"


@pytest.mark.parametrize("minutes", [2, 90])
def test_what_is_stored_and_what_waits_is_counted_once(app, tmp_path, redis_process: Redis, minutes):
    recorder = app.extensions["traffic"]
    with app.app_context():
        services.register("chat", sealed(tmp_path / "a", "a"))
        deployments.adopt_production("chat", 1)
        for expected in (1, 2):
            recorder.record(SEEN)
            found = compare(recorder, "chat", minutes)
            assert (found["is_complete"], found["recent"]["production"]["requests"]) == (True, expected)
        redis_process.stop()
        recorder.record(SEEN)
        found = compare(recorder, "chat", minutes)
        assert (found["is_complete"], found["recent"]["production"]["requests"]) == (False, 1)


def test_hashes_expire(settings, recorder):
    recorder.record(SEEN)
    recorder.flush()
    with redis.Redis.from_url(settings.redis_url) as client:
        limits = {key.split(b":")[2]: client.ttl(key) for key in client.keys("llmos:traffic:*")}
    assert 0 < limits[b"minute"] <= 26 * HOUR_S < limits[b"hour"] <= 31 * 24 * HOUR_S


def test_recording_costs_a_request_less_than_a_fifth_of_a_millisecond(recorder):
    recorder.record(SEEN)
    durations = []
    for _ in range(2000):
        started_at = time.perf_counter()
        recorder.record(SEEN)
        durations.append(time.perf_counter() - started_at)
    assert sorted(durations)[1900] < 0.0002
