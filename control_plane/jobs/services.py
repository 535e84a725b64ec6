"""Jobs from outside: submit, list, cancel, retry, read events.

    submit ──► QUEUED ──claim──► RUNNING ──► SUCCEEDED │ FAILED │ CANCELLED
                 ▲                  │ lease expired (worker died)        │
                 └──────────────────┴────────────── retry ───────────────┘

A message in Redis only wakes a worker, which then claims the most urgent job of its queue; a lost message delays a
job until ``mending`` sends another.
"""

from __future__ import annotations

import json
import re
import socket
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import redis
import structlog
from celery import Celery
from kombu.exceptions import OperationalError
from pydantic import ValidationError
from sqlalchemy import ColumnElement, func, select, update
from sqlalchemy.exc import IntegrityError

from control_plane.auth import audit
from control_plane.errors import BadRequest, Conflict, ControlPlaneError, NotFound
from control_plane.extensions import db, now
from control_plane.jobs.kinds import JobKind, JobParams
from control_plane.jobs.tables import CANCELLED, ENDED, FAILED, QUEUED, RUNNING, STATES, Job, JobEvent

CANARY_TASK = "canary"
RUN_TASK = "run_next"
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
HEAVY_QUEUES = ("cpu", "gpu")
LEASE = timedelta(seconds=15)
MAX_KEY_LENGTH = 128
JOB_ID = re.compile(r"[0-9a-f]{32}")
PRIORITIES = (-100, 100)

log = structlog.get_logger(__name__)
Kinds = Mapping[str, JobKind]


class WorkerUnavailable(ControlPlaneError):
    status = 503
    code = "worker_unavailable"


class RedisUnavailable(WorkerUnavailable):
    """No worker can be asked."""


@dataclass(frozen=True)
class WorkerPing:
    """A worker ran the canary; ``clock_s`` is its clock, in seconds since the epoch."""

    latency_s: float
    clock_s: float
    pid: int


def ping_worker(celery: Celery, timeout_s: float, queue: str = "default") -> WorkerPing:
    """Send the canary through a queue and wait for its answer; raises WorkerUnavailable.

    A worker process can be alive and yet consume nothing, so only a task that ran counts. The answer comes through a
    Redis list of our own: Celery's result backend gives up for good once Redis was away for 20 s.
    """
    reply_to = f"llmos:canary:{uuid.uuid4().hex}"
    sent_at = time.monotonic()
    try:
        celery.send_task(CANARY_TASK, args=[reply_to], expires=timeout_s, queue=queue)
        url, limit_s = celery.conf.broker_url, timeout_s + 1
        with redis.Redis.from_url(url, socket_timeout=limit_s, socket_connect_timeout=limit_s) as client:
            reply = client.blpop([reply_to], timeout=timeout_s)
    except (OperationalError, redis.RedisError, OSError) as error:
        # Where it is and what it said is not for everybody who sees the page.
        log.warning("redis_does_not_answer", reason=str(error))
        raise RedisUnavailable("Redis does not answer; see the log of the reconciler") from error
    if reply is None:
        raise WorkerUnavailable(f"no worker ran the canary task within {timeout_s:g} s")
    answer = json.loads(reply[1])
    return WorkerPing(latency_s=time.monotonic() - sent_at, clock_s=answer["clock_s"], pid=answer["pid"])


def submit(
    celery: Celery,
    kinds: Kinds,
    kind: str,
    params: Mapping[str, Any],
    *,
    priority: int = 0,
    idempotency_key: str | None = None,
) -> Job:
    """Store a job and wake a worker. The same ``idempotency_key`` again returns the job that it made before.

    Raises BadRequest for an unknown kind or bad parameters, Conflict for a key that was used for something else.
    """
    if kind not in kinds:
        raise BadRequest(f"kind has value {kind!r:.100}; expected one of {', '.join(kinds)}")
    given = check_params(kinds[kind], params)
    checked = given.model_dump(mode="json")
    if not PRIORITIES[0] <= priority <= PRIORITIES[1]:
        raise BadRequest(f"priority has value {priority}; expected {PRIORITIES[0]} to {PRIORITIES[1]}")
    if idempotency_key is not None and not 1 <= len(idempotency_key) <= MAX_KEY_LENGTH:
        raise BadRequest(f"Idempotency-Key has {len(idempotency_key)} characters; expected 1 to {MAX_KEY_LENGTH}")
    earlier = _by_key(idempotency_key)
    if earlier is None:
        job = Job(
            kind=kind,
            params=checked,
            queue="gpu" if given.needs_gpu else kinds[kind].queue,
            priority=priority,
            idempotency_key=idempotency_key,
            created_by=audit.current_actor(),
        )
        db.session.add(job)
        try:
            db.session.flush()
            audit.record("job.submit", job.id, kind=kind)
            db.session.commit()
        except IntegrityError:
            db.session.rollback()  # Another request with this key came between.
            earlier = _by_key(idempotency_key)
            if earlier is None:
                raise
        else:
            wake(celery, job.queue)
            return job
    if (earlier.kind, earlier.params) != (kind, checked):
        raise Conflict(
            f"Idempotency-Key {idempotency_key!r} belongs to job {earlier.id}, which is another one; use a new key"
        )
    return earlier


def check_params(kind: JobKind, params: Mapping[str, Any]) -> JobParams:
    """Parameters with defaults filled in; raises BadRequest for the first bad one."""
    try:
        return kind.params.model_validate_json(json.dumps(params), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        # Of a key that is refused, the value shown is the key itself.
        parts = (*first["loc"][:-2], "keys") if first["loc"][-1:] == ("[key]",) else first["loc"]
        name = ".".join(["params", *map(str, parts)])
        raise BadRequest(f"{name} has value {first.get('input')!r:.100}; {first['msg']}") from None


def get(job_id: str) -> Job:
    """Raises NotFound."""
    job = db.session.get(Job, job_id) if JOB_ID.fullmatch(job_id) else None
    if job is None:
        raise NotFound(f"job {job_id!r:.100} does not exist; GET /api/v1/jobs lists those that do")
    return job


def find(kind: str | None, state: str | None, before: str | None, limit: int) -> list[Job]:
    """Newest first; ``before`` is the id of the last job of the page before."""
    query = select(Job).order_by(Job.created_at.desc(), Job.id.desc()).limit(limit)
    if kind is not None:
        query = query.where(Job.kind == kind)
    if state is not None:
        if state not in STATES:
            raise BadRequest(f"state has value {state!r:.100}; expected one of {', '.join(STATES)}")
        query = query.where(Job.state == state)
    if before is not None:
        last = get(before)
        query = query.where(
            (Job.created_at < last.created_at) | ((Job.created_at == last.created_at) & (Job.id < last.id))
        )
    return list(db.session.scalars(query))


def running_job(queues: Sequence[str]) -> str | None:
    """The id of a job of these queues that a living worker runs."""
    query = select(Job.id).where(Job.state == RUNNING, Job.queue.in_(queues), Job.lease_expires_at > now())
    return db.session.scalar(query.limit(1))


def events(job_id: str, after: int, limit: int) -> list[JobEvent]:
    """The first ones with an id above ``after``."""
    query = select(JobEvent).where(JobEvent.job_id == job_id, JobEvent.id > after).order_by(JobEvent.id).limit(limit)
    return list(db.session.scalars(query))


def newest_events(job_id: str, limit: int) -> list[JobEvent]:
    """The last ones, in order."""
    query = select(JobEvent).where(JobEvent.job_id == job_id).order_by(JobEvent.id.desc()).limit(limit)
    return list(db.session.scalars(query))[::-1]


def cancel(job_id: str) -> Job:
    """A queued job ends at once, a running one as soon as its worker hears of it; an ended one is a Conflict."""
    job = get(job_id)
    why = "cancelled before it started" if job.started_at is None else "cancelled while it waited to go on"
    while not (
        change(Job.id == job_id, Job.state == QUEUED, state=CANCELLED, finished_at=now(), error=why)
        or change(
            Job.id == job_id, Job.state == RUNNING, cancel_requested_at=func.coalesce(Job.cancel_requested_at, now())
        )
    ):
        db.session.rollback()  # Between the two it may be started or given back.
        if job.state in ENDED:
            raise Conflict(f"job {job_id} has ended already ({job.state})")
    audit.record("job.cancel", job_id)
    db.session.commit()
    db.session.refresh(job)
    return job


def retry(celery: Celery, job_id: str, limit: timedelta) -> Job:
    """Queue a failed or cancelled job again; it goes on after its last finished step.

    Raises Conflict for any other, and if it ended longer than ``limit`` ago: then what it had made is gone.
    """
    job = get(job_id)
    fresh: dict[str, Any] = {
        "error": None,
        "finished_at": None,
        "cancel_requested_at": None,
        "lease_owner": None,
        "progress": {},
    }
    can_go_on = (Job.id == job_id, Job.state.in_((FAILED, CANCELLED)), Job.finished_at > now() - limit)
    if not change(*can_go_on, state=QUEUED, attempt=0, **fresh):
        db.session.rollback()
        if job.state in (FAILED, CANCELLED):
            raise Conflict(
                f"job {job_id} ended more than {limit.days} days ago and its files are gone; submit it again, "
                "and set LLMOS_RETRY_DAYS higher to keep such files longer"
            )
        raise Conflict(f"job {job_id} is {job.state}; only a FAILED or CANCELLED job can be run again")
    audit.record("job.retry", job_id)
    db.session.commit()
    wake(celery, job.queue)
    db.session.refresh(job)
    return job


def wake(celery: Celery, queue: str, times: int = 1) -> None:
    """Tell the workers of a queue that there is work. Without Redis nothing happens now; ``mending`` does it later."""
    try:
        for _ in range(times):
            celery.send_task(RUN_TASK, args=[queue], queue=queue)
    except (OperationalError, redis.RedisError, OSError) as error:
        log.warning("wake_failed", queue=queue, reason=str(error))


def owner_of_this_process() -> str:
    return f"{this_machine()}:{psutil.Process().pid}"


def this_machine() -> str:
    """Its name, and which of its starts this is: clones may have the same name."""
    return f"{socket.gethostname()}@{BOOT_ID.read_text(encoding='ascii')[:8]}"


def _by_key(idempotency_key: str | None) -> Job | None:
    if idempotency_key is None:
        return None
    return db.session.scalar(select(Job).where(Job.idempotency_key == idempotency_key))


def change(*conditions: ColumnElement[bool], **values: Any) -> bool:
    """Compare and set, in the current transaction: whether a row met the conditions."""
    result = db.session.execute(update(Job).where(*conditions).values(**values))
    return bool(result.rowcount)  # type: ignore[attr-defined]


def has_ended(job: Job) -> bool:
    return job.state in ENDED
