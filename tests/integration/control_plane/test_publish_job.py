"""The job ``publish`` with evaluation and deployment: one version, one deployment, whenever its worker dies."""

# ruff: noqa: F401, F811 (fixtures of another folder)
from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from flask import Flask

from control_plane import create_app, durable_folders, upgrade_database
from control_plane.extensions import db
from control_plane.jobs import runner
from control_plane.jobs import services as job_services
from control_plane.jobs.tables import CANCELLED, QUEUED, RUNNING, SUCCEEDED, Job
from control_plane.registry import deployments, services, serving_state
from control_plane.registry.places import Place
from control_plane.registry.serving_state import FAILED_TO_LOAD, LOADED, ModelState, ServingState
from control_plane.registry.steps import PublishParams
from control_plane.registry.tables import BLOCKED, SUPERSEDED, UP_TO_DATE, Deployment, Evaluation
from control_plane.settings import Settings
from control_plane.triton_fake import FakeTriton
from tests.integration.control_plane.processes import wait_for
from tests.integration.control_plane.run_jobs import JobRuns, reason
from tests.integration.exporters.conftest import llama_checkpoint, llama_version, make_checkpoint, tokenizer

pytestmark = pytest.mark.integration


DONE = {"export": {}, "store": {}, "register": {"version": 1}}


@pytest.fixture
def app(settings: Settings, llama_version: Path) -> Flask:
    """``chat`` has version 1, which counts as proven."""
    upgrade_database(settings)
    app = create_app(settings, FakeTriton({}))
    with app.app_context():
        services.register("chat", llama_version).passed = True
        db.session.commit()
    return app


@pytest.fixture
def publish(app: Flask, settings: Settings, llama_version: Path) -> Callable[..., Job]:
    """A job that has exported, stored and registered, run from there on."""

    def publish(**params: Any) -> Job:
        params = PublishParams(checkpoint="tiny", name="chat", **params).model_dump()
        with app.app_context():
            job = Job(kind="publish", params=params, queue="cpu", created_by="key:tester")
            db.session.add(job)
            db.session.commit()
            db.session.refresh(job)
            db.session.expunge(job)
        shutil.copytree(llama_version, settings.jobs_dir / job.id / "version")
        return JobRuns(app).again(job, DONE)

    return publish


class Reconciler:
    """Says, half a second after it is wanted, that the version is in ``state``, and ends deployments accordingly."""

    def __init__(self, app: Flask, state: str, message: str | None = None) -> None:
        self._app, self._state, self._message = app, state, message
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Reconciler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(0.5):
            with self._app.app_context():
                wanted = [number for intent in deployments.intents() for number in intent.wanted]
                found = ModelState(1, self._state, time.time(), "ModelLoadFailed", self._message)
                places = {Place("chat.canary", number): found for number in wanted}
                deployments.advance(ServingState({}, True, time.time(), places), timedelta(0))


def deployments_of(app: Flask) -> list[tuple[str, str, str]]:
    with app.app_context():
        query = sqlalchemy.select(Deployment.kind, Deployment.state, Deployment.created_by).order_by(Deployment.id)
        return [tuple(row) for row in db.session.execute(query)]


def test_a_version_is_measured_and_promoted_in_its_submitters_name(app: Flask, publish, settings, tmp_path):
    (tmp_path / "text.txt").write_text("The quick brown fox.")
    with app.app_context():
        services.edit_model("chat", {"thresholds": {"perplexity.bits_per_byte": {"max": 1000.0}}}, None)
    with Reconciler(app, LOADED):
        job = publish(evaluate={"perplexity": str(tmp_path / "text.txt")}, deploy="promote")
    assert (job.state, job.result["deployed"]) == (SUCCEEDED, "promote"), job.error
    assert deployments_of(app) == [("promote", UP_TO_DATE, "key:tester")]
    with app.app_context():
        assert services.resolve_version("chat", "production").number == 1
        assert db.session.scalar(sqlalchemy.select(sqlalchemy.func.count(Evaluation.id))) == 1


def test_what_the_gate_refuses_fails_the_job_and_nothing_is_deployed(app: Flask, publish):
    with app.app_context():
        services.edit_model("chat", {"thresholds": {"perplexity.bits_per_byte": {"max": 1.0}}}, None)
    assert "run an evaluation of suite 'perplexity'" in reason(publish(deploy="promote"))
    assert deployments_of(app) == []


def test_a_version_that_cannot_be_loaded_fails_the_job_with_the_reason(app: Flask, publish):
    with Reconciler(app, FAILED_TO_LOAD, "out of memory"):
        said = reason(publish(deploy="canary", weight=20.0))
    assert "canary is BlockedByFailedLoad: out of memory" in said and "llmos canary chat 1" in said
    assert deployments_of(app) == [("canary", BLOCKED, "key:tester")]


def test_a_job_that_is_run_again_goes_on_with_the_same_deployment(app: Flask, publish):
    with Reconciler(app, LOADED):
        job = publish(deploy="canary", weight=20.0)
    again = JobRuns(app).again(job, DONE)
    assert (again.state, again.result["deployment"]) == (SUCCEEDED, job.result["deployment"])
    assert len(deployments_of(app)) == 1


def test_a_cancelled_job_gives_up_its_deployment_and_makes_another_when_it_runs_again(app: Flask, publish):
    def cancel() -> None:
        with app.app_context():
            running = sqlalchemy.select(Job.id).where(Job.state == RUNNING)
            wait_for(lambda: db.session.rollback() or db.session.scalar(running), 20, "the job runs")
            wait_for(lambda: deployments_of(app), 20, "its deployment")
            job_services.cancel(db.session.scalar(running))

    thread = threading.Thread(target=cancel)
    thread.start()
    job = publish(deploy="promote")
    thread.join()
    assert job.state == CANCELLED
    with app.app_context():
        deployments.advance(ServingState(), timedelta(0))
    assert deployments_of(app) == [("promote", SUPERSEDED, "key:tester")]
    with Reconciler(app, LOADED):
        assert JobRuns(app).again(job).state == SUCCEEDED
    states = [state for _, state, _ in deployments_of(app)]
    assert sorted(states) == sorted([SUPERSEDED, UP_TO_DATE])


def test_a_job_that_is_cancelled_while_it_stores_stops_in_the_middle(
    app: Flask, publish, settings, llama_version, monkeypatch
):
    def cancel(folder: Path, needed_bytes: int) -> None:
        """Called as the copy begins; goes on when the job has heard of it."""
        job_id = db.session.scalar(sqlalchemy.select(Job.id).where(Job.state == RUNNING))
        db.session.rollback()
        job_services.cancel(job_id)
        time.sleep(3 * runner.POLL_S)

    job = publish()
    shutil.copytree(llama_version, settings.jobs_dir / job.id / "version")
    with monkeypatch.context() as patched:
        patched.setattr(durable_folders, "require_space", cancel)
        stopped = JobRuns(app).again(job, {"export": {}})
    assert (stopped.state, stopped.error) == (CANCELLED, "cancelled on request")
    assert [path.name for path in (settings.home / "artifacts").iterdir()] == [".lock"]
    assert JobRuns(app).again(stopped).state == SUCCEEDED


def test_a_worker_that_is_stopped_while_it_waits_gives_the_job_back_and_the_deployment_is_kept(app: Flask, publish):
    def stop() -> None:
        with app.app_context():
            wait_for(lambda: deployments_of(app), 20, "a deployment")
        runner.stopping(app).set()

    thread = threading.Thread(target=stop)
    thread.start()
    job = publish(deploy="promote")
    thread.join()
    assert job.state == QUEUED
    runner.stopping(app).clear()
    with Reconciler(app, LOADED):
        assert JobRuns(app).again(job).state == SUCCEEDED
    assert deployments_of(app) == [("promote", UP_TO_DATE, "key:tester")]


def test_data_that_is_missing_is_said_before_anything_is_exported(app: Flask):
    job = JobRuns(app).run("publish", checkpoint="none", name="chat", evaluate={"perplexity": "/nonexistent"})
    assert "'/nonexistent', which is no file" in reason(job)
