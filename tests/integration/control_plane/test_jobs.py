"""Jobs on a real Redis, both databases and real workers: killed, cut off, cancelled, given back."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections import Counter
from datetime import timedelta

import pytest
import redis
import sqlalchemy

from control_plane.auth.services import create_key
from control_plane.errors import BadRequest, Conflict
from control_plane.extensions import db, now
from control_plane.jobs import mending, runner, services
from control_plane.jobs.tables import CANCELLED, FAILED, QUEUED, RUNNING, SUCCEEDED, Job, JobEvent

from .processes import lock, wait_for
from .running_jobs import child_pid, is_gone, lines

pytestmark = pytest.mark.integration
on_both_databases = pytest.mark.parametrize("database_url", ["sqlite", "postgresql"], indirect=True)


@pytest.fixture
def database_url(request):
    is_postgresql = getattr(request, "param", "sqlite") == "postgresql"
    return request.getfixturevalue("migrated_postgresql") if is_postgresql else ""


def test_a_job_runs_its_steps_and_its_events_tell_the_story(jobs, start_worker, settings):
    start_worker()
    job_id = jobs.submit("chain")
    job = jobs.wait(job_id, SUCCEEDED)
    assert job.result == {"noted": job_id, "after": job_id}
    assert (job.attempt, list(job.steps), job.error) == (1, ["first", "second"], None)
    assert job.started_at <= job.finished_at
    told = [(event["event"], event.get("step")) for event in jobs.events(job_id) if event["event"] != "progress"]
    assert told == [("step", "first"), ("step", "second"), ("finished", None), ("ended", None)]
    assert {"event": "progress", "done": 0} in jobs.events(job_id)
    assert not (settings.jobs_dir / job_id).exists()


@on_both_databases
def test_lines_that_a_child_prints_become_events_up_to_a_limit(jobs, monkeypatch):
    monkeypatch.setattr(runner, "MAX_LOG_LINES", 3)
    job_id = jobs.submit("chain", {"seconds": 1, "num_lines": 10})
    jobs.call(runner.run_next, jobs.app, "default")
    told = [event for event in jobs.events(job_id) if event["event"] == "log"]
    assert {event["stream"] for event in told} == {"stderr"}
    long = "line 1" + "!" * (runner.MAX_LINE_CHARS - len("line 1")) + "…"
    left_out = "… more than 3 lines; further ones of this run are left out"
    assert [event["message"] for event in told] == ["line 0", long, "line 2", left_out]


@on_both_databases
def test_a_worker_killed_in_the_second_step_is_replaced_and_the_first_step_is_not_repeated(
    jobs, start_worker, settings
):
    worker = start_worker()
    job_id = jobs.submit("chain", {"seconds": 4})
    pid = child_pid(settings)
    worker.kill()
    wait_for(lambda: is_gone(pid), 5, "end of the child with its worker")
    start_worker()
    job = jobs.wait(job_id, SUCCEEDED, 60)
    assert job.attempt == 2
    assert lines(settings.home / "notes") == [job_id]
    assert len(lines(settings.home / "children")) == 2


def test_a_worker_that_is_told_to_stop_gives_its_job_back(jobs, start_worker, settings):
    worker = start_worker()
    job_id = jobs.submit("chain", {"seconds": 4})
    pid = child_pid(settings)
    worker.signal(signal.SIGTERM)
    job = jobs.wait(job_id, QUEUED, 10)
    assert (job.attempt, job.lease_owner) == (0, None)
    wait_for(lambda: is_gone(pid), 10, "end of the child")
    start_worker()
    assert jobs.wait(job_id, SUCCEEDED, 60).attempt == 1


@on_both_databases
def test_cancel_ends_a_running_job_and_its_child_within_seconds(jobs, start_worker, settings):
    start_worker()
    job_id = jobs.submit("chain", {"seconds": 60})
    pid = child_pid(settings)
    jobs.call(services.cancel, job_id)
    assert jobs.wait(job_id, CANCELLED, 10).error == "cancelled on request"
    assert is_gone(pid)
    with pytest.raises(Conflict, match="has ended already"):
        jobs.call(services.cancel, job_id)


def test_cancel_of_a_queued_job_means_it_never_runs(jobs, start_worker, settings):
    first = jobs.submit("note")
    jobs.call(services.cancel, first)
    start_worker()
    jobs.wait(jobs.submit("note"), SUCCEEDED)
    assert jobs.get(first).state == CANCELLED
    assert first not in lines(settings.home / "notes")


@on_both_databases
def test_a_failed_job_says_why_and_a_retry_goes_on_after_its_last_finished_step(jobs, start_worker, settings, tmp_path):
    start_worker()
    needed = tmp_path / "needed"
    job_id = jobs.submit("chain", {"needed": str(needed)})
    assert jobs.wait(job_id, FAILED).error == f"{needed} is missing"
    needed.touch()
    jobs.call(services.retry, jobs.app.extensions["celery"], job_id, settings.retry_limit)
    jobs.wait(job_id, SUCCEEDED)
    assert lines(settings.home / "notes") == [job_id]
    with pytest.raises(Conflict, match="only a FAILED or CANCELLED job"):
        jobs.call(services.retry, jobs.app.extensions["celery"], job_id, settings.retry_limit)


def test_200_jobs_drain_through_two_workers_while_redis_is_restarted_twice(jobs, start_worker, settings, redis_process):
    ids = [jobs.submit("note") for _ in range(200)]
    start_worker()
    start_worker()
    for share in (40, 110):
        wait_for(lambda share=share: len(lines(settings.home / "notes")) >= share, 60, f"{share} jobs")
        redis_process.stop()
        redis_process.start()
    with jobs.app.app_context():
        left = sqlalchemy.select(sqlalchemy.func.count()).where(Job.state != SUCCEEDED)
        wait_for(lambda: db.session.scalar(left) == 0 or db.session.rollback(), 90, "end of all jobs")
    assert Counter(lines(settings.home / "notes")) == Counter(ids)


def test_a_flushed_redis_loses_no_job(jobs, start_worker, settings):
    job_id = jobs.submit("note")
    with redis.Redis.from_url(settings.redis_url) as client:
        client.flushall()
    start_worker()
    jobs.wait(job_id, SUCCEEDED)


def test_more_urgent_jobs_come_first(jobs, start_worker, settings):
    ids = [jobs.submit("note", priority=priority) for priority in (0, 5, -5, 5)]
    start_worker()
    for job_id in ids:
        jobs.wait(job_id, SUCCEEDED)
    assert lines(settings.home / "notes") == [ids[1], ids[3], ids[0], ids[2]]


@on_both_databases
def test_a_job_goes_on_while_redis_is_away_and_the_database_is_locked(jobs, start_worker, settings, redis_process):
    start_worker()
    job_id = jobs.submit("chain", {"seconds": 4})
    child_pid(settings)
    redis_process.stop()
    writer = sqlalchemy.create_engine(settings.database_url)
    with writer.connect() as connection:
        lock(connection, "jobs")
        time.sleep(6)  # longer than a database itself waits
        connection.rollback()
    redis_process.start()
    assert jobs.wait(job_id, SUCCEEDED).attempt == 1


@on_both_databases
def test_a_job_is_claimed_once_and_a_runner_without_its_lease_writes_nothing(jobs):
    job_id = jobs.submit("note")
    first = jobs.call(runner.claim, "default", "elsewhere:1")
    assert first.id == job_id
    assert jobs.call(runner.claim, "default", "elsewhere:2") is None
    lost = runner.Runner(jobs.app, first)
    with jobs.app.app_context():
        db.session.execute(sqlalchemy.update(Job).values(lease_expires_at=Job.created_at))
        db.session.commit()
        mending.mend(jobs.app.extensions["celery"])
    second = jobs.call(runner.claim, "default", "elsewhere:2")
    assert (second.id, second.attempt) == (job_id, 2)
    lost.run()
    assert jobs.get(job_id).state == RUNNING
    assert jobs.events(job_id) == []


@on_both_databases
def test_a_lease_that_is_renewed_while_the_mender_looks_is_kept(jobs, monkeypatch):
    job_id = jobs.submit("note")
    jobs.call(runner.claim, "default", "elsewhere:1")

    def looked_at_too_early(job: Job) -> bool:
        with db.engine.begin() as other:
            other.execute(sqlalchemy.update(Job).values(lease_expires_at=now() + timedelta(seconds=30)))
        return True

    monkeypatch.setattr(mending, "_is_lost", looked_at_too_early)
    with jobs.app.app_context():
        mending.mend(jobs.app.extensions["celery"])
    assert jobs.get(job_id).state == RUNNING


@on_both_databases
def test_many_claimers_never_get_the_same_job(jobs):
    ids = {jobs.submit("note") for _ in range(20)}
    taken: list[str] = []

    def take() -> None:
        while (job := jobs.call(lambda: getattr(runner.claim("default", "here:0"), "id", None))) is not None:
            taken.append(job)

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == sorted(ids)


@on_both_databases
def test_a_job_whose_worker_dies_again_and_again_fails(jobs):
    job_id = jobs.submit("note")
    for _ in range(mending.MAX_ATTEMPTS):
        assert jobs.call(runner.claim, "default", "elsewhere:1").id == job_id
        with jobs.app.app_context():
            db.session.execute(sqlalchemy.update(Job).values(lease_expires_at=Job.created_at))
            db.session.commit()
            mending.mend(jobs.app.extensions["celery"])
    assert "its worker died 3 times" in jobs.get(job_id).error


@on_both_databases
@pytest.mark.parametrize("change", [{"kind": "forgotten"}, {"params": {"gone": 1}}])
def test_a_job_of_another_release_fails_and_says_so(jobs, change):
    job_id = jobs.submit("note")
    with jobs.app.app_context():
        db.session.execute(sqlalchemy.update(Job).values(change))
        db.session.commit()
    assert runner.run_next(jobs.app, "default") == job_id
    job = jobs.get(job_id)
    assert job.state == FAILED
    assert "this release cannot run it" in job.error


@on_both_databases
def test_an_idempotency_key_gives_the_same_job_again_and_refuses_another(jobs):
    first = jobs.submit("chain", {"seconds": 1}, idempotency_key="k")
    assert jobs.submit("chain", {"seconds": 1}, idempotency_key="k") == first
    with pytest.raises(Conflict, match="belongs to job"):
        jobs.submit("chain", {"seconds": 2}, idempotency_key="k")
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(jobs.submit("note", idempotency_key="same"))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1


def test_bad_parameters_are_refused_before_anything_is_stored(jobs):
    for params, words in (({"seconds": "soon"}, "params.seconds"), ({"minutes": 1}, "params.minutes")):
        with pytest.raises(BadRequest, match=words):
            jobs.submit("chain", params)
    with pytest.raises(BadRequest, match="expected one of export, publish, verify, "):
        jobs.submit("nothing")


def test_events_are_followed_live_and_resumed_by_their_id(jobs, start_worker):
    with jobs.app.app_context():
        key = create_key("test", "viewer")
    client = jobs.app.test_client()
    headers = {"Authorization": f"Bearer {key}", "Accept": "text/event-stream"}
    start_worker()
    job_id = jobs.submit("chain", {"seconds": 1})
    whole = parse_events(client.get(f"/api/v1/jobs/{job_id}/events", headers=headers).text)
    assert whole[-1][1]["event"] == "ended"
    assert [number for number, _ in whole] == sorted({number for number, _ in whole})
    headers["Last-Event-ID"] = str(whole[2][0])
    assert parse_events(client.get(f"/api/v1/jobs/{job_id}/events", headers=headers).text) == whole[3:]


def parse_events(text: str) -> list[tuple[int, dict]]:
    blocks = [block.split("\n") for block in text.strip().split("\n\n") if block.startswith("id:")]
    return [(int(block[0].removeprefix("id: ")), json.loads(block[1].removeprefix("data: "))) for block in blocks]


def test_folders_are_removed_when_their_job_cannot_be_run_again(jobs, settings):
    days = {"fresh": (FAILED, 1), "old": (FAILED, 8), "cancelled": (CANCELLED, 8), "done": (SUCCEEDED, 0)}
    ids = {name: jobs.submit("note") for name in ("queued", *days)}
    ids["forgotten"] = "0" * 32
    for job_id in (*ids.values(), "not-a-job"):
        (settings.jobs_dir / job_id / "version").mkdir(parents=True)
    eight_days_ago = time.time() - 8 * 24 * 3600
    for name in ("forgotten", "queued"):
        os.utime(settings.jobs_dir / ids[name], (eight_days_ago, eight_days_ago))
    with jobs.app.app_context():
        for name, (state, age) in days.items():
            ended_at = now() - timedelta(days=age)
            services.change(Job.id == ids[name], state=state, finished_at=ended_at)
        db.session.commit()
        mending.remove_old_folders(settings)
    kept = {path.name for path in settings.jobs_dir.iterdir()}
    assert kept == {ids["queued"], ids["fresh"], "not-a-job"}
    celery = jobs.app.extensions["celery"]
    for name in ("old", "cancelled"):
        with pytest.raises(Conflict, match="ended more than 7 days ago and its files are gone; submit it again"):
            jobs.call(services.retry, celery, ids[name], settings.retry_limit)
    assert jobs.call(services.retry, celery, ids["fresh"], settings.retry_limit).state == QUEUED


@on_both_databases
def test_what_jobs_said_is_deleted_a_batch_at_a_time_when_they_ended_long_ago(jobs, settings, monkeypatch):
    monkeypatch.setattr(mending, "EVENTS_AT_ONCE", 2)
    days = {"fresh": (SUCCEEDED, 1), "done": (SUCCEEDED, 8), "failed": (FAILED, 8), "running": (RUNNING, 8)}
    ids = {name: jobs.submit("note") for name in days}
    with jobs.app.app_context():
        for name, (state, age) in days.items():
            ended_at = None if state == RUNNING else now() - timedelta(days=age)
            services.change(Job.id == ids[name], state=state, finished_at=ended_at)
            db.session.add_all(JobEvent(job_id=ids[name], attempt=1, event={"event": "log"}) for _ in range(5))
        db.session.commit()
        mending.remove_old_events(settings)
    assert {name: len(jobs.events(ids[name])) for name in days} == {"fresh": 5, "done": 0, "failed": 0, "running": 5}
    assert jobs.get(ids["done"]).state == SUCCEEDED


def test_a_worker_removes_old_folders_when_it_starts(jobs, start_worker, settings):
    job_id = jobs.submit("note")
    jobs.call(runner.run_next, jobs.app, "default")
    (settings.jobs_dir / job_id).mkdir()
    start_worker()
    wait_for(lambda: not (settings.jobs_dir / job_id).exists(), 30, "removal of the folder")
