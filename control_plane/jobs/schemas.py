"""Jobs as the API shows and takes them."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from control_plane.extensions import iso
from control_plane.jobs.tables import Job, JobEvent


class JobIn(BaseModel):
    model_config = ConfigDict(extra="forbid")

    kind: str = Field(max_length=32)
    params: dict[str, Any] = Field(default_factory=dict)
    priority: int = 0


def job_out(job: Job) -> dict[str, Any]:
    """Times are ISO 8601 in UTC."""
    return {
        "id": job.id,
        "kind": job.kind,
        "params": job.params,
        "queue": job.queue,
        "priority": job.priority,
        "state": job.state,
        "attempt": job.attempt,
        "progress": job.progress,
        "steps": list(job.steps),
        "result": job.result,
        "error": job.error,
        "is_cancelling": job.cancel_requested_at is not None,
        "created_by": job.created_by,
        "created_at": iso(job.created_at),
        "started_at": iso(job.started_at),
        "heartbeat_at": iso(job.heartbeat_at),
        "finished_at": iso(job.finished_at),
    }


def event_out(event: JobEvent) -> dict[str, Any]:
    return {"id": event.id, "at": iso(event.at), "attempt": event.attempt, **event.event}
