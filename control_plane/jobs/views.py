"""Routes of jobs under /api/v1: parse, one service call, render."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

from apiflask import APIBlueprint
from flask import Flask, Response, current_app, jsonify, request

from control_plane.auth.services import require_key, role_allows
from control_plane.auth.watch import Watch
from control_plane.errors import ControlPlaneError, Forbidden, Overloaded
from control_plane.extensions import db
from control_plane.jobs import services
from control_plane.jobs.kinds import JobKind
from control_plane.jobs.schemas import JobIn, event_out, job_out
from control_plane.requests import page, parse_body, query_number, query_text
from control_plane.responses import problem_body

jobs = APIBlueprint("jobs", __name__, url_prefix="/api/v1")

MAX_PAGE = 200
MAX_EVENTS = 1000
POLL_S = 0.3
KEEP_ALIVE_S = 15.0
STREAM_LIMIT_S = 3600.0


@jobs.get("/job-kinds")
@require_key("viewer")
def list_kinds() -> dict[str, Any]:
    return {"data": [_kind_out(name, kind) for name, kind in _kinds().items()]}


@jobs.get("/jobs")
@require_key("viewer")
def list_jobs() -> dict[str, Any]:
    limit = query_number("limit", 50, most=MAX_PAGE)
    found = services.find(query_text("kind"), query_text("state"), query_text("before"), limit + 1)
    return page(found, limit, job_out)


@jobs.post("/jobs")
@require_key("developer")
def submit_job() -> Response:
    body = parse_body(JobIn)
    kind = _kinds().get(body.kind)
    if kind is not None and not role_allows(kind.role):
        raise Forbidden(f"jobs of kind {body.kind!r} need the role {kind.role!r}")
    job = services.submit(
        current_app.extensions["celery"],
        _kinds(),
        body.kind,
        body.params,
        priority=body.priority,
        idempotency_key=request.headers.get("Idempotency-Key"),
    )
    response = jsonify(job_out(job))
    response.status_code = 202
    response.headers["Location"] = f"/api/v1/jobs/{job.id}"
    return response


@jobs.get("/jobs/<job_id>")
@require_key("viewer")
def show_job(job_id: str) -> dict[str, Any]:
    return job_out(services.get(job_id))


@jobs.get("/jobs/<job_id>/events")
@require_key("viewer")
def list_events(job_id: str) -> dict[str, Any] | Response:
    """A page of events, or, for ``Accept: text/event-stream``, all of them and those to come until the job ends."""
    services.get(job_id)
    if request.accept_mimetypes.best_match(["application/json", "text/event-stream"]) == "text/event-stream":
        after = query_number("after", _last_event_id(), least=0)
        # The session belongs to this request; the stream outlives it and opens its own.
        db.session.rollback()
        app = current_app._get_current_object()  # type: ignore[attr-defined]
        slots = app.extensions["event_stream_slots"]
        if not slots.acquire(blocking=False):
            raise Overloaded("too many event streams are open; close some, or set LLMOS_WEB_THREADS higher")
        events = _until_error(app, _event_stream(app, Watch(), job_id, after))
        response = Response(events, content_type="text/event-stream; charset=utf-8")
        response.call_on_close(slots.release)
        response.headers["Cache-Control"] = "no-cache"
        response.headers["X-Accel-Buffering"] = "no"
        return response
    limit = query_number("limit", 200, most=MAX_EVENTS)
    found = services.events(job_id, query_number("after", 0, least=0), limit + 1)
    return page(found, limit, event_out)


@jobs.post("/jobs/<job_id>/cancel")
@require_key("operator", "jobs")
def cancel_job(job_id: str) -> dict[str, Any]:
    return job_out(services.cancel(job_id))


@jobs.post("/jobs/<job_id>/retry")
@require_key("operator", "jobs")
def retry_job(job_id: str) -> dict[str, Any]:
    return job_out(services.retry(current_app.extensions["celery"], job_id))


def _until_error(app: Flask, events: Iterator[str]) -> Iterator[str]:
    """A stream that cannot go on says why in its last event, a problem document."""
    try:
        yield from events
    except ControlPlaneError as error:
        with app.app_context():
            problem = problem_body(str(error), error.status, error.code)
        yield f"event: error\ndata: {json.dumps(problem, ensure_ascii=False)}\n\n"


def _event_stream(app: Flask, watch: Watch, job_id: str, after: int) -> Iterator[str]:
    """Read from SQL, not from Redis: what was missed is there, and losing Redis loses nothing."""
    sent_at = started_at = time.monotonic()
    while time.monotonic() - started_at < STREAM_LIMIT_S:
        watch.check()
        with app.app_context():
            # Asked first: what it said before it ended is then surely read below.
            has_ended = services.has_ended(services.get(job_id))
            found = [(event.id, event_out(event)) for event in services.events(job_id, after, MAX_EVENTS)]
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


def _last_event_id() -> int:
    given = request.headers.get("Last-Event-ID", "0")
    return int(given) if given.isascii() and given.isdecimal() and len(given) < 19 else 0
