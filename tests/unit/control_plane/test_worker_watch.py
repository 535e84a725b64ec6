"""Workers are asked again and again; one that is silent for a minute is started anew, if nothing else is wrong."""

from __future__ import annotations

import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from control_plane.errors import ControlPlaneError
from control_plane.extensions import db, now
from control_plane.jobs import worker_watch
from control_plane.jobs.services import RedisUnavailable, WorkerPing, WorkerUnavailable
from control_plane.jobs.tables import RUNNING, Job
from control_plane.jobs.worker_watch import SILENCE_LIMIT_S, WorkerWatch, read

pytestmark = pytest.mark.unit


class Workers:
    """Answers pings by queue, or raises what stands in ``errors``; the clock is its own."""

    def __init__(self) -> None:
        self.errors: dict[str, Exception] = {}
        self.restarted: list[str] = []
        self.now_s = 1000.0

    def ping(self, celery, timeout_s: float, queue: str) -> WorkerPing:
        if queue in self.errors:
            raise self.errors[queue]
        return WorkerPing(latency_s=0.012, clock_s=time.time(), pid=1)

    def restart(self, program: str) -> None:
        self.restarted.append(program)


@pytest.fixture
def workers(monkeypatch):
    workers = Workers()
    monkeypatch.setattr(worker_watch, "ping_worker", workers.ping)
    monkeypatch.setattr(worker_watch, "time", SimpleNamespace(monotonic=lambda: workers.now_s, time=time.time))
    return workers


@pytest.fixture
def watch(app, workers):
    return WorkerWatch(app, workers.restart)


SILENT = WorkerUnavailable("no worker ran the canary task within 2 s")


def look_for(watch: WorkerWatch, workers: Workers, seconds: float) -> None:
    for _ in range(2):
        watch.look()
        workers.now_s += seconds


def test_answers_are_shown_on_the_page_in_the_health_and_as_a_metric(client, settings, watch):
    assert not any(state.is_answered for state in read(settings).values())
    watch.look()
    assert "ran a task in 12 ms, 0 s ago" in client.get("/status").get_data(as_text=True)
    queues = client.get("/health/ready").get_json()["queues"]
    assert sorted(queues) == ["cpu", "default", "gpu"]
    assert all(queue["is_answered"] and queue["answered_s_ago"] < 5 for queue in queues.values())
    families = text_string_to_metric_families(client.get("/metrics").get_data(as_text=True))
    (answered,) = (family for family in families if family.name == "llmos_worker_last_answer_timestamp_seconds")
    assert {sample.labels["queue"]: time.time() - sample.value < 5 for sample in answered.samples} == dict.fromkeys(
        queues, True
    )


def test_what_was_heard_long_ago_is_no_answer(client, settings, watch, monkeypatch):
    watch.look()
    hour_later = SimpleNamespace(monotonic=time.monotonic, time=lambda: time.time() + 3600)
    monkeypatch.setattr(worker_watch, "time", hour_later)
    assert not any(state.is_answered for state in read(settings).values())
    assert "it was last asked 3600 s ago" in read(settings)["cpu"].detail


def test_a_silent_queue_keeps_the_time_of_its_last_answer(client, settings, watch, workers):
    watch.look()
    before = read(settings)["cpu"].answered_at
    workers.errors["cpu"] = SILENT
    watch.look()
    state = read(settings)["cpu"]
    assert (state.is_answered, state.answered_at, state.detail) == (False, before, str(SILENT))
    assert read(settings)["default"].is_answered
    assert str(SILENT) in client.get("/status").get_data(as_text=True)


def test_a_worker_that_is_silent_for_a_minute_is_started_anew_once(watch, workers):
    workers.errors["gpu"] = SILENT
    look_for(watch, workers, SILENCE_LIMIT_S - 1)
    assert workers.restarted == []
    watch.look()
    watch.look()
    assert workers.restarted == ["worker-heavy"]
    look_for(watch, workers, SILENCE_LIMIT_S + 1)
    watch.look()
    assert workers.restarted == ["worker-heavy"] * 2


def test_a_worker_is_left_alone_while_redis_is_away(watch, workers):
    workers.errors = dict.fromkeys(("default", "cpu", "gpu"), RedisUnavailable("Redis does not answer"))
    look_for(watch, workers, SILENCE_LIMIT_S * 2)
    watch.look()
    assert workers.restarted == []


def test_a_worker_that_runs_a_job_is_not_silent(app, settings, watch, workers):
    with app.app_context():
        lease = {"lease_owner": "here:1", "lease_expires_at": now() + timedelta(hours=1)}
        db.session.add(Job(kind="export", params={}, queue="cpu", state=RUNNING, created_by="key:k", **lease))
        db.session.commit()
    workers.errors = {"cpu": SILENT, "gpu": SILENT}
    look_for(watch, workers, SILENCE_LIMIT_S * 2)
    watch.look()
    assert workers.restarted == []
    assert read(settings)["cpu"].detail.startswith("runs job ")


def test_who_cannot_be_restarted_is_asked_on(watch, workers, settings):
    def refuse(program: str) -> None:
        raise ControlPlaneError("supervisord does not answer")

    watch._restart = refuse
    workers.errors["default"] = SILENT
    look_for(watch, workers, SILENCE_LIMIT_S + 1)
    watch.look()
    workers.errors.clear()
    watch.look()
    assert read(settings)["default"].is_answered


@pytest.mark.parametrize("content", ["", "[]", '{"cpu": 1}', '{"cpu": {"x": 1}}'])
def test_a_file_that_cannot_be_read_says_nothing(settings, watch, content):
    watch.look()
    (settings.run_dir / "workers.json").write_text(content)
    assert read(settings)["cpu"].answered_at is None
