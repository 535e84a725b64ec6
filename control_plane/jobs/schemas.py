"""Jobs as the API shows and takes them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from control_plane.auth.roles import ROLES
from control_plane.extensions import iso
from control_plane.jobs.services import JOB_ID, MAX_KEY_LENGTH, PRIORITIES
from control_plane.jobs.tables import STATES, JobEvent
from control_plane.operations import Out, Time
from control_plane.requests import FROM_DIGITS, FROM_JSON, LARGEST, PageQuery, Text

MAX_EVENTS = 1000

JobId = Annotated[str, Field(pattern=f"^{JOB_ID.pattern}$")]
EventId = Annotated[int, Field(ge=0, le=LARGEST), FROM_DIGITS]
State = Literal[STATES]  # type: ignore[valid-type]


class JobQuery(PageQuery):
    kind: Text | None = None
    state: State | None = None
    before: JobId | None = Field(None, description="the id of the last job of the page before")


class JobIn(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    kind: str = Field(max_length=32)
    params: dict[str, Any] = Field(default_factory=dict)
    priority: Annotated[int, Field(ge=PRIORITIES[0], le=PRIORITIES[1]), FROM_JSON] = Field(
        0, description="higher starts earlier"
    )


class SubmitHeaders(BaseModel):
    idempotency_key: str | None = Field(
        None,
        alias="Idempotency-Key",
        min_length=1,
        max_length=MAX_KEY_LENGTH,
        description="the same key again gives the job that it made before",
    )


class EventQuery(BaseModel):
    limit: Annotated[int, Field(ge=1, le=MAX_EVENTS), FROM_DIGITS] = Field(200, description="most events to give")
    after: EventId | None = Field(None, description="the id of the last event that is known already")
    newest: Annotated[bool, FROM_JSON] = Field(False, description="the last `limit` events instead of the first")


class EventHeaders(BaseModel):
    last_event_id: EventId = Field(0, alias="Last-Event-ID", description="for a stream, the same as `after`")


class JobOut(Out):
    id: JobId
    kind: str
    params: dict[str, Any]
    queue: str
    priority: int
    state: State
    attempt: int
    progress: dict[str, Any] = Field(description="step, done and total of the step that runs")
    steps: Annotated[list[str], BeforeValidator(list)] = Field(description="names of the finished steps")
    result: dict[str, Any] | None
    error: str | None
    is_cancelling: bool
    created_by: str
    created_at: Time
    started_at: Time | None
    heartbeat_at: Time | None
    finished_at: Time | None


class EventOut(Out):
    """What a job's child or its runner said: an object with further keys, according to ``event``.

    ``log`` is a plain line that the child printed: ``stream`` is stdout or stderr, ``message`` the line.
    """

    model_config = ConfigDict(extra="allow")

    id: int
    at: Time
    attempt: int
    event: str


class KindOut(Out):
    name: str
    purpose: str
    queue: str
    role: Literal[ROLES]  # type: ignore[valid-type]
    steps: list[str]
    params: dict[str, Any] = Field(description="a JSON Schema of the parameters")


class KindsOut(Out):
    data: list[KindOut]


def event_out(event: JobEvent) -> dict[str, Any]:
    return {**event.event, "id": event.id, "at": iso(event.at), "attempt": event.attempt}
