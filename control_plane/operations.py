"""What an operation of the REST API takes and gives, declared once above its view:

    @jobs.post("/jobs")
    @require_key("developer")
    @Operation(JobOut, 202, body=JobIn, headers=SubmitHeaders, errors=(Conflict,))
    def submit_job(body: JobIn, headers: SubmitHeaders) -> Any:

What is declared is parsed, and handed to a view that has a parameter ``query``, ``headers`` or ``body``; what the view
returns is rendered through the declared model; ``control_plane.openapi`` shows the same declaration. So the document
is what happens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import wraps
from typing import Annotated, Any, Generic, TypeVar

from flask import Response, jsonify
from pydantic import BaseModel, BeforeValidator, ConfigDict, WithJsonSchema
from werkzeug.http import quote_etag

from control_plane.errors import ControlPlaneError
from control_plane.extensions import iso
from control_plane.requests import parse_body, parse_headers, parse_query

HTML = "text/html"
EVENT_STREAM = "text/event-stream"
ETAG = {"ETag": "the revision, for If-Match"}
NO_STORE = {"Cache-Control": "no-store: it holds a secret"}

Item = TypeVar("Item")
View = Callable[..., Any]

Time = Annotated[
    str,
    BeforeValidator(lambda value: iso(value) if isinstance(value, datetime) else value),
    WithJsonSchema({"type": "string", "format": "date-time"}),
]
"""ISO 8601 in UTC, to the millisecond; made from a column of ours or from a text that is one already."""


class Out(BaseModel):
    """Base of answers: built from a mapping or from any object with these attributes, such as a row.

    A key that is not declared is our own mistake, which must show.
    """

    model_config = ConfigDict(extra="forbid", from_attributes=True)


class Page(Out, Generic[Item]):
    """``has_more``: there is another page behind the last of ``data``."""

    data: list[Item]
    has_more: bool


@dataclass(frozen=True)
class Operation:
    """Decorator of a view, below ``require_key``: nothing is parsed for a stranger.

    ``answer`` is the model of the answer in JSON, the media type of another one, or None. ``also`` names statuses that
    give the same answer; ``errors`` what the view raises besides what the key, the parameters and the path bring with
    them; ``reads`` a body that the view parses itself; ``sends`` describes headers of the answer. With ``has_stream``
    the answer may also be server-sent events.
    """

    answer: type[BaseModel] | str | None
    status: int = 200
    also: tuple[int, ...] = ()
    query: type[BaseModel] | None = None
    headers: type[BaseModel] | None = None
    body: type[BaseModel] | None = None
    reads: type[BaseModel] | None = None
    errors: tuple[type[ControlPlaneError], ...] = ()
    sends: Mapping[str, str] = field(default_factory=dict)
    has_stream: bool = False

    def __call__(self, view: View) -> View:
        wanted = inspect.signature(view).parameters

        @wraps(view)
        def wrapper(**path: Any) -> Any:
            given = {name: value for name, value in self.parse().items() if name in wanted}
            return self.render(view(**path, **given))

        wrapper.__dict__["operation"] = self
        return wrapper

    @staticmethod
    def of(view: View) -> Operation | None:
        """What a view, however decorated, was declared to be."""
        return getattr(view, "operation", None)

    def parse(self) -> dict[str, BaseModel]:
        """What the request gives; raises BadRequest."""
        given: dict[str, BaseModel] = {}
        if self.query is not None:
            given["query"] = parse_query(self.query)
        if self.headers is not None:
            given["headers"] = parse_headers(self.headers)
        if self.body is not None:
            given["body"] = parse_body(self.body)
        return given

    def render(self, result: Any) -> Any:
        """``result`` is what the view returned: an answer, an answer and headers, or a response that is sent as is."""
        if isinstance(result, Response) or not isinstance(self.answer, type):
            return result
        content, headers = result if isinstance(result, tuple) else (result, {})
        response = jsonify(self.answer.model_validate(content).model_dump(mode="json"))
        response.status_code = self.status
        response.headers.update(headers)
        return response


def with_etag(document: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The document, and its ``revision`` as its ETag."""
    return document, {"ETag": quote_etag(str(document["revision"]))}
