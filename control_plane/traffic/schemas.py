"""Traffic as the API shows it."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field

from control_plane.operations import Out, Time
from control_plane.requests import FROM_DIGITS

MAX_MINUTES = 1440


class TrafficQuery(BaseModel):
    minutes: Annotated[int, Field(ge=1, le=MAX_MINUTES), FROM_DIGITS] = Field(
        5, description="how far the recent window reaches back, the present minute included"
    )


class FiguresOut(Out):
    """What one version met. Times are those of the web server; null where nothing was measured."""

    version: int
    requests: int
    requests_per_s: float
    errors: dict[str, int] = Field(description="requests that failed, by the code of their error")
    error_share: float | None = Field(description="0 to 1, without client_gone, client_timeout and invalid_request")
    prompt_tokens: int
    completion_tokens: int
    first_token_p50_s: float | None
    first_token_p95_s: float | None
    end_p50_s: float | None
    end_p95_s: float | None
    tokens_per_s: float | None = Field(description="generated tokens per second of an answered request")


class WindowOut(Out):
    since: Time
    seconds: float
    production: FiguresOut | None = None
    canary: FiguresOut | None = None


class TrafficOut(Out):
    model: str
    is_complete: bool = Field(description="false: Redis does not answer, and what it keeps is missing")
    recent: WindowOut
    since_canary: WindowOut | None = Field(None, description="null without a canary")
