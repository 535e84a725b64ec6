"""The canary through a real Redis and a real worker."""

from __future__ import annotations

import time

import pytest

from control_plane.extensions import create_celery
from control_plane.jobs.services import WorkerPing, WorkerUnavailable, ping_worker

from .processes import wait_for

pytestmark = pytest.mark.integration


def try_ping(celery, timeout_s: float = 2.0) -> WorkerPing | None:
    try:
        return ping_worker(celery, timeout_s)
    except WorkerUnavailable:
        return None


def test_worker_runs_the_canary_and_logs_no_secret(settings, worker):
    celery = create_celery(settings)
    assert try_ping(celery, 30)
    ping = ping_worker(celery, 5)
    assert ping.latency_s < 2
    assert abs(ping.clock_s - time.time()) < 5
    assert "process=worker" in worker.log.read_text()
    # It is asked every few seconds.
    assert "canary" not in worker.log.read_text().partition(" ready.")[2]


def test_canary_without_a_worker_fails_within_its_time(settings, redis_process):
    started_at = time.monotonic()
    with pytest.raises(WorkerUnavailable, match=r"no worker ran the canary task within 0\.5 s"):
        ping_worker(create_celery(settings), 0.5)
    assert time.monotonic() - started_at < 3


def test_canary_without_redis_says_so_at_once(settings):
    started_at = time.monotonic()
    with pytest.raises(WorkerUnavailable, match="Redis does not answer"):
        ping_worker(create_celery(settings), 1)
    assert time.monotonic() - started_at < 5


def test_canary_works_again_after_redis_was_restarted(settings, redis_process, worker):
    celery = create_celery(settings)
    assert try_ping(celery, 30)
    redis_process.stop()
    assert try_ping(celery, 1) is None
    redis_process.start()
    wait_for(lambda: try_ping(celery), 30, "an answer of the worker")
