"""What keeps jobs going: every worker looks, again and again, for jobs of dead workers and for queues that sleep.

It writes by compare-and-set, so that several may look at once. Every hour it clears folders of jobs that cannot be
run again, and what jobs said that ended as long ago.
"""

from __future__ import annotations

import math
import shutil
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import redis
import structlog
from celery import Celery
from flask import Flask
from sqlalchemy import delete, func, select

from control_plane.databases import UNREACHABLE, reason_of
from control_plane.extensions import db, now
from control_plane.jobs.services import JOB_ID, change, this_machine, wake
from control_plane.jobs.tables import CANCELLED, ENDED, FAILED, QUEUED, RUNNING, SUCCEEDED, Job, JobEvent
from control_plane.settings import Settings

MEND_S = 2.0
AFTER_AN_OUTAGE_S = 5.0
TIDY_S = 3600.0
EVENTS_AT_ONCE = 1000
"""So many are deleted in one transaction: whoever else writes waits no longer than that takes."""
CLOCK_TOLERANCE = timedelta(minutes=5)
"""Another machine's clock may still allow a retry."""
MAX_ATTEMPTS = 3
"""A job that takes its worker down so many times is not started again."""

log = structlog.get_logger(__name__)


def keep_mending(app: Flask, stopping: threading.Event) -> None:
    """Until ``stopping`` is set; whatever the database does."""
    was_away, tidied_at, looked_at = False, -math.inf, time.time()
    while not stopping.wait(MEND_S):
        # By the clock of leases: a machine that slept renewed none meanwhile.
        was_away |= time.time() - looked_at > MEND_S + AFTER_AN_OUTAGE_S
        try:
            with app.app_context():
                if was_away:
                    # Every lease may have expired meanwhile: those who run jobs renew theirs first.
                    db.session.execute(select(1))
                    db.session.rollback()
                    stopping.wait(AFTER_AN_OUTAGE_S)
                mend(app.extensions["celery"])
                if time.monotonic() - tidied_at >= TIDY_S:
                    remove_old_folders(app.config["SETTINGS"])
                    remove_old_events(app.config["SETTINGS"])
                    tidied_at = time.monotonic()
            was_away = False
        except UNREACHABLE as error:
            was_away = True
            log.warning("mending_failed", reason=reason_of(error))
        except Exception:
            # Whatever it was, the next look is two seconds away; a thread that ended would never look again.
            log.exception("mending_failed")
        looked_at = time.time()


def mend(celery: Celery) -> None:
    """Give jobs of dead workers to others, and wake workers for jobs whose message was lost; called again and again."""
    for job in db.session.scalars(select(Job).where(Job.state == RUNNING)).all():
        if not _is_lost(job):
            continue
        if job.cancel_requested_at is not None:
            values: dict[str, Any] = {"state": CANCELLED, "finished_at": now(), "error": "cancelled; its worker died"}
        elif job.attempt >= MAX_ATTEMPTS:
            why = f"its worker died {job.attempt} times while it ran; see the worker's log and the memory limits"
            values = {"state": FAILED, "finished_at": now(), "error": why}
        else:
            values = {"state": QUEUED, "lease_owner": None, "lease_expires_at": None}
        # One that was renewed since it was looked at is not lost.
        is_same_lease = Job.lease_expires_at.is_not_distinct_from(job.lease_expires_at)
        is_same_run = Job.fencing_token == job.fencing_token
        if change(Job.id == job.id, Job.state == RUNNING, is_same_run, is_same_lease, **values):
            log.warning("job_lost_its_worker", job=job.id, attempt=job.attempt, state=values["state"])
        db.session.commit()
    waiting = db.session.execute(select(Job.queue, func.count()).where(Job.state == QUEUED).group_by(Job.queue)).all()
    db.session.rollback()
    for queue, num_jobs in waiting:
        if _num_messages(celery, queue) == 0:
            wake(celery, queue, num_jobs)


def remove_old_folders(settings: Settings) -> None:
    """Delete the folders of jobs that have ended for good, or that this database does not know any more."""
    latest = now() - settings.retry_limit - CLOCK_TOLERANCE
    for folder in settings.jobs_dir.glob("*"):
        if not JOB_ID.fullmatch(folder.name):
            continue
        job = db.session.get(Job, folder.name)
        if _has_ended_before(job, latest) if job is not None else _changed_at(folder) < latest:
            shutil.rmtree(folder, ignore_errors=True)
            log.info("job_folder_removed", job=folder.name)
    db.session.rollback()


def remove_old_events(settings: Settings) -> None:
    """Delete the events of jobs that ended before the limit of retries; the jobs stay."""
    latest = now() - settings.retry_limit - CLOCK_TOLERANCE
    of_old_jobs = select(JobEvent.id).join(Job).where(Job.state.in_(ENDED), Job.finished_at < latest)
    batch, num_deleted = delete(JobEvent).where(JobEvent.id.in_(of_old_jobs.limit(EVENTS_AT_ONCE))), 0
    while deleted := db.session.execute(batch).rowcount:  # type: ignore[attr-defined]
        db.session.commit()
        num_deleted += deleted
    db.session.rollback()
    if num_deleted:
        log.info("job_events_removed", num_events=num_deleted)


def _has_ended_before(job: Job, latest: datetime) -> bool:
    if job.state == SUCCEEDED:
        return True
    return job.state in ENDED and job.finished_at is not None and job.finished_at < latest


def _changed_at(folder: Path) -> datetime:
    try:
        return datetime.fromtimestamp(folder.stat().st_mtime, UTC).replace(tzinfo=None)
    except FileNotFoundError:
        return now()  # Another worker was faster.


def _is_lost(job: Job) -> bool:
    if job.lease_expires_at is None or job.lease_expires_at < now():
        return True
    host, _, pid = (job.lease_owner or "").rpartition(":")
    return host == this_machine() and pid.isdigit() and not psutil.pid_exists(int(pid))


def _num_messages(celery: Celery, queue: str) -> int | None:
    try:
        with redis.Redis.from_url(celery.conf.broker_url, socket_timeout=2, socket_connect_timeout=2) as client:
            return int(client.llen(queue))
    except redis.RedisError:
        return None
