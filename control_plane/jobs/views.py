"""Routes of jobs under /api/v1: parse, one service call, render."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

from apiflask import APIBlueprint
from flask import Flask, Response, current_app, g, request

from control_plane.auth.principal import current_principal
from control_plane.auth.services import require_key
from control_plane.auth.watch import Watch
from control_plane.databases import UNREACHABLE
from control_plane.errors import BadRequest, Conflict, ControlPlaneError, NotFound, Overloaded
from control_plane.extensions import db
from control_plane.jobs import services
from control_plane.jobs.kinds import JobKind
from control_plane.jobs.schemas import (
    MAX_EVENTS,
    EventHeaders,
    EventOut,
    EventQuery,
    JobIn,
    JobOut,
    JobQuery,
    KindsOut,
    SubmitHeaders,
    event_out,
)
from control_plane.jobs.tables import Job
from control_plane.operations import EVENT_STREAM, Operation, Page
from control_plane.requests import page
from control_plane.responses import problem_body

jobs = APIBlueprint("jobs", __name__, url_prefix="/api/v1")

POLL_S = 0.3
KEEP_ALIVE_S = 15.0
STREAM_LIMIT_S = 3600.0


@jobs.get("/job-kinds")
@require_key("viewer")
@Operation(KindsOut)
def list_kinds() -> dict[str, Any]:
    """Kinds of jobs, with the schemas of their parameters."""
    return {"data": [_kind_out(name, kind) for name, kind in _kinds().items()]}


@jobs.get("/jobs")
@require_key("viewer")
@Operation(Page[JobOut], query=JobQuery, errors=(NotFound,))
def list_jobs(query: JobQuery) -> dict[str, Any]:
    """Jobs, newest first."""
    return page(services.find(query.kind, query.state, query.before, query.limit + 1), query.limit)


@jobs.post("/jobs")
@require_key("developer")
@Operation(
    JobOut, 202, headers=SubmitHeaders, body=JobIn, errors=(Conflict,), sends={"Location": "where the job is shown"}
)
def submit_job(headers: SubmitHeaders, body: JobIn) -> tuple[Job, dict[str, str]]:
    """Submit a job; its kind may need a higher role."""
    kind = _kinds().get(body.kind)
    if kind is not None:
        _require(kind, body.params)
    job = services.submit(
        current_app.extensions["celery"],
        _kinds(),
        body.kind,
        body.params,
        priority=body.priority,
        idempotency_key=headers.idempotency_key,
    )
    return job, {"Location": f"/api/v1/jobs/{job.id}"}


@jobs.get("/jobs/<job_id>")
@require_key("viewer")
@Operation(JobOut)
def show_job(job_id: str) -> Job:
    """One job."""
    return services.get(job_id)


@jobs.get("/jobs/<job_id>/events")
@require_key("viewer")
@Operation(Page[EventOut], query=EventQuery, headers=EventHeaders, errors=(Overloaded,), has_stream=True)
def list_events(job_id: str, query: EventQuery, headers: EventHeaders) -> dict[str, Any] | Response:
    """A page of events, or, for ``Accept: text/event-stream``, all of them and those to come until the job ends."""
    services.get(job_id)
    if request.accept_mimetypes.best_match(["application/json", EVENT_STREAM]) == EVENT_STREAM:
        after = headers.last_event_id if query.after is None else query.after
        # The session belongs to this request; the stream outlives it and opens its own.
        db.session.rollback()
        app = current_app._get_current_object()  # type: ignore[attr-defined]
        slots = app.extensions["event_stream_slots"]
        if not slots.acquire(blocking=False):
            raise Overloaded("too many event streams are open; close some, or set LLMOS_WEB_THREADS higher")
        events = _until_error(app, g.request_id, _event_stream(app, Watch(), job_id, after))
        response = Response(events, content_type=f"{EVENT_STREAM}; charset=utf-8")
        response.call_on_close(slots.release)
        response.headers["Cache-Control"] = "no-cache"
        response.headers["X-Accel-Buffering"] = "no"
        return response
    if query.newest:
        return page(services.newest_events(job_id, query.limit), query.limit, event_out)
    return page(services.events(job_id, query.after or 0, query.limit + 1), query.limit, event_out)


@jobs.post("/jobs/<job_id>/cancel")
@require_key("operator", "jobs")
@Operation(JobOut, errors=(Conflict,))
def cancel_job(job_id: str) -> Job:
    """End a job that has not ended."""
    return services.cancel(job_id)


@jobs.post("/jobs/<job_id>/retry")
@require_key("operator", "jobs")
@Operation(JobOut, errors=(Conflict,))
def retry_job(job_id: str) -> Job:
    """Run a failed or cancelled job again, from its last finished step on; for those who may submit it."""
    job = services.get(job_id)
    if (kind := _kinds().get(job.kind)) is not None:
        try:
            _require(kind, job.params)
        except BadRequest as error:
            raise Conflict(f"this release cannot run job {job_id} again: {error}") from None
    limit = current_app.config["SETTINGS"].retry_limit
    return services.retry(current_app.extensions["celery"], job_id, limit)


def _require(kind: JobKind, params: dict[str, Any]) -> None:
    """What jobs of a kind with such parameters ask of whoever has them run."""
    current_principal().require(kind.role, (services.check_params(kind, params).scope,))


def _until_error(app: Flask, request_id: str, events: Iterator[str]) -> Iterator[str]:
    """A stream that cannot go on says why in its last event, a problem document."""
    try:
        yield from events
    except ControlPlaneError as error:
        with app.app_context():
            g.request_id = request_id
            problem = problem_body(str(error), error.status, error.code)
        yield f"event: error\ndata: {json.dumps(problem, ensure_ascii=False)}\n\n"


def _event_stream(app: Flask, watch: Watch, job_id: str, after: int) -> Iterator[str]:
    """Read from SQL, not from Redis: what was missed is there, and losing Redis loses nothing."""
    sent_at = started_at = time.monotonic()
    while time.monotonic() - started_at < STREAM_LIMIT_S:
        watch.check()
        try:
            has_ended, found = _read_events(app, job_id, after)
        except UNREACHABLE:
            # Whoever listens waits with us; nothing is lost.
            has_ended, found = False, []
        for after, document in found:
            yield f"id: {after}\ndata: {json.dumps(document, ensure_ascii=False)}\n\n"
        if has_ended and not found:
            return
        now = time.monotonic()
        if found:
            sent_at = now
        elif now - sent_at > KEEP_ALIVE_S:
            sent_at = now
            yield ": still there\n\n"
        if not has_ended:
            time.sleep(POLL_S)


def _read_events(app: Flask, job_id: str, after: int) -> tuple[bool, list[tuple[int, dict[str, Any]]]]:
    """Whether the job has ended, and its next events with their ids."""
    with app.app_context():
        # Asked first: what it said before it ended is then surely read below.
        has_ended = services.has_ended(services.get(job_id))
        return has_ended, [(event.id, event_out(event)) for event in services.events(job_id, after, MAX_EVENTS)]


def _kind_out(name: str, kind: JobKind) -> dict[str, Any]:
    return {
        "name": name,
        "purpose": kind.purpose,
        "queue": kind.queue,
        "role": kind.role,
        "steps": list(kind.steps),
        "params": kind.params.model_json_schema(),
    }


def _kinds() -> dict[str, JobKind]:
    return current_app.extensions["job_kinds"]
