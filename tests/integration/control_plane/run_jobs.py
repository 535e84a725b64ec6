"""Runs jobs in the test's own process, with real children but without Redis and without a worker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sqlalchemy
from flask import Flask

from control_plane.extensions import db
from control_plane.jobs import runner, services
from control_plane.jobs.tables import FAILED, QUEUED, RUNNING, Job


class JobRuns:
    def __init__(self, app: Flask) -> None:
        self._app = app

    def run(self, kind: str, **params: Any) -> Job:
        """Submit a job and run it to its end."""
        with self._app.app_context():
            extensions = self._app.extensions
            job = services.submit(extensions["celery"], extensions["job_kinds"], kind, params)
            return self._run(job.id)

    def again(self, job: Job, steps: Mapping[str, Any] | None = None) -> Job:
        """Run a job once more, as after a retry; with ``steps`` as if its worker had been killed behind those."""
        with self._app.app_context():
            known = job.steps if steps is None else steps
            fresh = {"error": None, "finished_at": None, "cancel_requested_at": None}
            again = sqlalchemy.update(Job).where(Job.id == job.id).values(state=QUEUED, steps=dict(known), **fresh)
            db.session.execute(again)
            db.session.commit()
            return self._run(job.id)

    def _run(self, job_id: str) -> Job:
        queue = services.get(job_id).queue
        db.session.rollback()
        assert runner.run_next(self._app, queue) == job_id
        job = services.get(job_id)
        db.session.refresh(job)
        assert job.state != RUNNING
        db.session.expunge(job)
        return job


def reason(job: Job) -> str:
    """Why a job failed."""
    assert job.state == FAILED, job.result
    return job.error or ""
