"""A PostgreSQL that is stopped, crashes and comes back under a running web server, worker and job."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import httpx
import pytest

from control_plane.auth.services import create_key
from control_plane.client import ControlPlane
from control_plane.jobs import mending, runner
from control_plane.jobs.tables import SUCCEEDED

from .processes import wait_for, web_server
from .running_jobs import child_pid, lines

pytestmark = pytest.mark.integration


@pytest.fixture
def database_url(migrated_postgresql):
    return migrated_postgresql


@pytest.fixture
def restarted(postgresql):
    """Whatever a test does to the server, the next one finds it running."""
    yield postgresql
    postgresql.start()


@pytest.fixture
def web(app, environment, settings, tmp_path) -> Iterator[str]:
    with web_server(environment, settings.web_port, tmp_path / "web.log") as url:
        yield url


@pytest.fixture
def key(app) -> str:
    with app.app_context():
        return create_key("test", "operator")


def test_web_says_503_while_the_database_is_away_and_works_with_the_first_request_after(web, key, restarted):
    with httpx.Client(base_url=web, headers={"Authorization": f"Bearer {key}"}, timeout=20) as client:
        # Several connections, all of which will be dead.
        requests = [threading.Thread(target=client.get, args=("/api/v1/jobs",)) for _ in range(8)]
        for request in requests:
            request.start()
        for request in requests:
            request.join()
        restarted.stop()
        for path in ("/api/v1/jobs", "/api/v1/models", "/v1/models"):
            answer = client.get(path)
            assert answer.status_code == 503
            assert "database_unavailable" in answer.text
            assert "127.0.0.1" not in answer.text
        assert client.get("/health/live").status_code == 200
        restarted.start()
        for path in ("/api/v1/jobs", "/api/v1/models", "/v1/models"):
            assert client.get(path).status_code == 200


def test_a_job_and_those_who_follow_it_survive_a_crash_of_the_database(
    web,
    key,
    jobs,
    start_worker,
    settings,
    restarted,
):
    start_worker()
    job_id = jobs.submit("chain", {"seconds": 4})
    heard: list[dict] = []
    with ControlPlane(web, key) as llmos:
        follower = threading.Thread(target=lambda: heard.extend(llmos.follow_job(job_id)))
        follower.start()
        child_pid(settings)
        restarted.stop(signal.SIGQUIT)
        time.sleep(2)
        restarted.start()
        follower.join(60)
    job = jobs.get(job_id)
    assert (job.state, job.attempt) == (SUCCEEDED, 1)
    assert heard[-1]["event"] == "ended"
    assert [event["id"] for event in heard] == sorted({event["id"] for event in heard})
    assert jobs.wait(jobs.submit("note"), SUCCEEDED).attempt == 1


def test_a_step_that_loses_its_connection_is_run_again(jobs, settings, restarted):
    job_id = jobs.submit("ask")
    running = threading.Thread(target=runner.run_next, args=(jobs.app, "default"))
    running.start()
    wait_for((settings.home / "asked").exists, 10, "the first question")
    restarted.stop(signal.SIGQUIT)
    restarted.start()
    (settings.home / "answered").touch()
    running.join(30)
    job = jobs.get(job_id)
    assert (job.state, job.attempt) == (SUCCEEDED, 1)
    assert lines(settings.home / "asked") == [job_id, job_id]


def test_a_database_that_was_away_longer_than_a_lease_takes_no_job_from_its_worker(
    jobs,
    settings,
    restarted,
    monkeypatch,
):
    # The mender looks sooner than the runner writes.
    monkeypatch.setattr(mending, "MEND_S", 0.1)
    monkeypatch.setattr(runner, "POLL_S", 1.0)
    monkeypatch.setattr(runner, "HEARTBEAT_S", 0.0)
    monkeypatch.setattr(runner, "LEASE", timedelta(seconds=3))
    monkeypatch.setattr(mending, "AFTER_AN_OUTAGE_S", 2.0)
    stopping = threading.Event()
    mender = threading.Thread(target=mending.keep_mending, args=(jobs.app, stopping))
    job_id = jobs.submit("chain", {"seconds": 6})
    running = threading.Thread(target=runner.run_next, args=(jobs.app, "default"))
    running.start()
    mender.start()
    child_pid(settings)
    restarted.stop()
    time.sleep(4)
    restarted.start()
    running.join(60)
    stopping.set()
    mender.join()
    job = jobs.get(job_id)
    assert (job.state, job.attempt) == (SUCCEEDED, 1)
