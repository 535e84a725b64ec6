"""Runs one job: claim, steps, end. Used by the worker's task; one ``Runner`` per run.

The main thread runs the steps. A second one renews the lease, and stops the child when the job was cancelled or the
lease is lost. Both write through ``_write``, which names the fencing token: without the lease nothing is written.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import structlog
from flask import Flask
from pydantic import ValidationError
from sqlalchemy import select, update
from sqlalchemy.exc import SQLAlchemyError

from control_plane.databases import UNREACHABLE, reason_of
from control_plane.errors import ControlPlaneError
from control_plane.extensions import db, now
from control_plane.jobs.kinds import JobKind, Step
from control_plane.jobs.services import LEASE, owner_of_this_process
from control_plane.jobs.tables import CANCELLED, FAILED, QUEUED, RUNNING, SUCCEEDED, Job, JobEvent
from control_plane.settings import PROJECT_ROOT, Settings
from control_plane.subprocesses import ChildEvent, run_child, stop_group

HEARTBEAT_S = 3.0
FLUSH_S = 0.25
POLL_S = 0.5
DATABASE_PATIENCE_S = 60.0
MAX_EVENT_CHARS = 20_000
MAX_LOG_LINES = 10_000
"""Of one run of a job; what its children print beyond that is not recorded."""
MAX_LINE_CHARS = 2_000

log = structlog.get_logger(__name__)


class JobCancelled(ControlPlaneError):
    code = "cancelled"


class WorkerStopping(ControlPlaneError):
    """The worker is told to end; the job goes back into the queue."""

    code = "worker_stopping"


class LeaseLost(ControlPlaneError):
    """Another worker has the job now; whatever this one still does is not recorded."""

    code = "lease_lost"


def stopping(app: Flask) -> threading.Event:
    """Set when this process is told to end: no job is claimed any more, and those that run are given back."""
    event: threading.Event = app.extensions["jobs_stopping"]
    return event


def claim(queue: str, owner: str) -> Job | None:
    """Take the most urgent job of a queue, or None. Needs an application context."""
    while True:
        query = select(Job.id).where(Job.state == QUEUED, Job.queue == queue)
        job_id = db.session.scalar(query.order_by(Job.priority.desc(), Job.created_at).limit(1))
        if job_id is None:
            db.session.rollback()
            return None
        taken = db.session.execute(
            update(Job)
            .where(Job.id == job_id, Job.state == QUEUED)
            .values(
                state=RUNNING,
                attempt=Job.attempt + 1,
                fencing_token=Job.fencing_token + 1,
                lease_owner=owner,
                lease_expires_at=now() + LEASE,
                heartbeat_at=now(),
                started_at=db.func.coalesce(Job.started_at, now()),
            )
        )
        db.session.commit()
        if taken.rowcount:  # type: ignore[attr-defined]
            return db.session.get(Job, job_id)


def run_next(app: Flask, queue: str) -> str | None:
    """Claim and run one job of ``queue``; returns its id, or None if there was none."""
    if stopping(app).is_set():
        return None
    with app.app_context():
        job = claim(queue, owner_of_this_process())
        if job is None:
            return None
        job_id = job.id
        try:
            runner = Runner(app, job)
        except (KeyError, ValidationError) as error:
            # Submitted to another release of llmos, which had this kind or these parameters.
            job.state, job.finished_at = FAILED, now()
            job.error = f"this release cannot run it ({error}); submit it again as llmos jobs kinds says"
            db.session.commit()
            return job_id
    runner.run()
    return job_id


class Runner:
    """The ``JobRun`` that steps see."""

    def __init__(self, app: Flask, job: Job) -> None:
        self._app = app
        self._kind: JobKind = app.extensions["job_kinds"][job.kind]
        self._token = job.fencing_token
        self._attempt = job.attempt
        self.job_id = job.id
        self.actor = job.created_by
        self.settings: Settings = app.config["SETTINGS"]
        self.folder: Path = self.settings.jobs_dir / job.id
        self.params = self._kind.params.model_validate(job.params)
        self.results: Mapping[str, Mapping[str, Any]] = dict(job.steps)
        self._step = ""
        self._lock = threading.Lock()
        self._events: list[dict[str, Any]] = []
        self._num_lines = 0
        self._flushed_at = 0.0
        self._stopped: ControlPlaneError | None = None
        self._done = threading.Event()
        self._child: subprocess.Popen[str] | None = None

    def run(self) -> None:
        heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        heart.start()
        log.info("job_started", job=self.job_id, attempt=self._attempt)
        try:
            self._end(*self._outcome())
        except WorkerStopping:
            self._give_back()
        except LeaseLost as error:
            log.warning("job_lost", job=self.job_id, reason=str(error))
        finally:
            self._done.set()
            heart.join()

    def child(
        self,
        module: str,
        *arguments: str,
        good_statuses: Sequence[int] = (0,),
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> ChildEvent | None:
        self._check()
        try:
            return run_child(
                [sys.executable, "-m", module, *arguments],
                self._note,
                {**os.environ, **environment},
                folder=PROJECT_ROOT,
                good_statuses=good_statuses,
                on_start=self._started,
                on_line=self._note_line,
            )
        except ControlPlaneError:
            self._check()  # If it was stopped from here, that is the reason.
            raise
        finally:
            self._child = None

    def pause(self, seconds: float) -> None:
        time.sleep(seconds)
        self._check()

    def _check(self) -> None:
        if self._stopped is not None:
            raise self._stopped

    def _outcome(self) -> tuple[str, str | None]:
        """Run the steps; the state in which the job ends, and why."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for number, (name, step) in enumerate(self._kind.steps.items()):
                if name in self.results:
                    continue
                self._check()
                self._step = name
                progress = {"step": name, "done": number, "total": len(self._kind.steps)}
                self._write(progress=progress)
                self._record({"event": "step", **progress})
                self.results = {**self.results, name: self._result_of(step)}
                self._write(steps=dict(self.results))
            return SUCCEEDED, None
        except (LeaseLost, WorkerStopping):
            raise
        except JobCancelled as error:
            return CANCELLED, str(error)
        except ControlPlaneError as error:
            return FAILED, str(error)
        except OSError as error:
            return FAILED, f"step {self._step}: {error}"
        except Exception as error:
            log.exception("job_crashed", job=self.job_id, step=self._step)
            what = f"{type(error).__name__}: {error}"
            return FAILED, f"step {self._step}: internal error, {what}; the worker's log has it"

    def _result_of(self, step: Step) -> Mapping[str, Any]:
        """A step that lost the database is run again, as it would be if the worker had died in it."""
        lost_at: float | None = None
        while True:
            try:
                with self._app.app_context():
                    return dict(step(self) or {})
            except UNREACHABLE as error:
                log.warning("step_lost_the_database", job=self.job_id, step=self._step, reason=reason_of(error))
                lost_at = lost_at or time.monotonic()
                if time.monotonic() - lost_at > DATABASE_PATIENCE_S:
                    raise
                time.sleep(POLL_S)
                self._check()

    def _end(self, state: str, error: str | None) -> None:
        result = {key: value for found in self.results.values() for key, value in found.items()}
        done = {"step": self._step, "done": len(self.results), "total": len(self._kind.steps)}
        self._record({"event": "ended", "state": state, "message": error})
        self._write(state=state, error=error, result=result, progress=done, finished_at=now(), lease_owner=None)
        log.info("job_ended", job=self.job_id, state=state, reason=error)
        if state == SUCCEEDED:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _give_back(self) -> None:
        self._record({"event": "given_back", "step": self._step})
        self._write(state=QUEUED, attempt=self._attempt - 1, lease_owner=None, lease_expires_at=None)
        log.info("job_given_back", job=self.job_id)

    def _started(self, child: subprocess.Popen[str]) -> None:
        self._child = child
        if self._stopped is not None:
            stop_group(child)

    def _note(self, event: ChildEvent) -> None:
        """One event of the child; the last one, ``finished``, is long and known to the step."""
        fields = dict(event.fields)
        if event.event == "finished":
            fields = {key: value for key, value in fields.items() if not isinstance(value, (dict, list))}
        self._record(fields)
        self._check()

    def _note_line(self, stream: str, line: str) -> None:
        """One log line of the child, from the thread that reads it; it is written with the next events or heartbeat."""
        if not line:
            return
        with self._lock:
            self._num_lines += 1
            if self._num_lines > MAX_LOG_LINES + 1:
                return
            if self._num_lines > MAX_LOG_LINES:
                line = f"… more than {MAX_LOG_LINES} lines; further ones of this run are left out"
            self._events.append({"event": "log", "stream": stream, "message": _cut(line, MAX_LINE_CHARS)})

    def _record(self, event: dict[str, Any]) -> None:
        text = event.get("message")
        if isinstance(text, str):
            event = {**event, "message": _cut(text, MAX_EVENT_CHARS)}
        with self._lock:
            self._events.append(event)
        if time.monotonic() - self._flushed_at >= FLUSH_S:
            self._write()

    def _write(self, **values: Any) -> None:
        """Renew the lease, store waiting events and ``values``; raises LeaseLost and then has written nothing.

        A database that is locked or away is tried again for a while: the work is worth more than the wait.
        """
        deadline = time.monotonic() + DATABASE_PATIENCE_S
        with self._lock:
            while True:
                try:
                    return self._commit(values)
                except UNREACHABLE as error:
                    log.warning("job_write_failed", job=self.job_id, reason=reason_of(error))
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(POLL_S)

    def _commit(self, values: dict[str, Any]) -> None:
        with self._app.app_context():
            changed = db.session.execute(
                update(Job)
                .where(Job.id == self.job_id, Job.fencing_token == self._token, Job.state == RUNNING)
                .values({"heartbeat_at": now(), "lease_expires_at": now() + LEASE, **values})
            )
            if not changed.rowcount:  # type: ignore[attr-defined]
                db.session.rollback()
                raise LeaseLost(f"job {self.job_id} is no longer run by this worker (token {self._token})")
            for event in self._events:
                db.session.add(JobEvent(job_id=self.job_id, attempt=self._attempt, event=event))
            db.session.commit()
            self._events, self._flushed_at = [], time.monotonic()

    def _beat(self) -> None:
        beaten_at = time.monotonic()
        while not self._done.wait(POLL_S):
            try:
                if self._events or time.monotonic() - beaten_at >= HEARTBEAT_S:
                    self._write()
                    beaten_at = time.monotonic()
                if stopping(self._app).is_set():
                    self._stop(WorkerStopping("the worker is stopping"))
                elif self._is_cancelled():
                    self._stop(JobCancelled("cancelled on request"))
            except LeaseLost as error:
                # The end of the job also makes the lease invalid.
                if not self._done.is_set():
                    self._stop(error)
            except SQLAlchemyError as error:
                log.warning("heartbeat_failed", job=self.job_id, reason=str(error))

    def _is_cancelled(self) -> bool:
        with self._app.app_context():
            query = select(Job.cancel_requested_at).where(Job.id == self.job_id)
            return self._stopped is None and db.session.scalar(query) is not None

    def _stop(self, reason: ControlPlaneError) -> None:
        if self._stopped is None:
            self._stopped = reason
            child = self._child
            if child is not None:
                stop_group(child)


def _cut(text: str, max_chars: int) -> str:
    return text if len(text) <= max_chars else text[:max_chars] + "…"
