"""What routes of the REST API have in common: bodies by their schema, parameters of the query, pages, revisions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from flask import Response, jsonify, request
from pydantic import BaseModel, ValidationError

from control_plane.errors import BadRequest
from control_plane.responses import read_body

MAX_TEXT = 200

Body = TypeVar("Body", bound=BaseModel)
Row = TypeVar("Row")


def parse_body(schema: type[Body]) -> Body:
    """Raises BadRequest naming the first field that is not as expected."""
    try:
        return schema.model_validate_json(read_body())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(map(str, first["loc"])) or "the body"
        raise BadRequest(f"{name} is not as expected: {first['msg']}") from None


def query_number(name: str, default: int, *, least: int = 1, most: int = 2**63 - 1) -> int:
    """A parameter of the query; raises BadRequest."""
    given = request.args.get(name)
    if given is None:
        return default
    # Digits of ASCII only: int() takes others, too.
    if not (given.isascii() and given.isdecimal() and len(given) < 20 and least <= int(given) <= most):
        raise BadRequest(f"{name} has value {given!r:.100}; expected a whole number from {least} to {most}")
    return int(given)


def query_text(name: str) -> str | None:
    """A parameter of the query; raises BadRequest for what no name of ours can be."""
    value = request.args.get(name)
    if value is not None and not (len(value) <= MAX_TEXT and value.isprintable()):
        raise BadRequest(f"{name} has value {value!r:.100}; expected at most {MAX_TEXT} printable characters")
    return value


def page(rows: Sequence[Row], limit: int, render: Callable[[Row], dict[str, Any]]) -> dict[str, Any]:
    """One page of a list; ``rows`` were read with one more than ``limit``, which tells whether there is another."""
    return {"data": [render(row) for row in rows[:limit]], "has_more": len(rows) > limit}


def with_etag(document: dict[str, Any]) -> Response:
    """The document with its ``revision`` as its ETag."""
    response = jsonify(document)
    response.set_etag(str(document["revision"]))
    return response


def expected_revision() -> int | None:
    """The revision that ``If-Match`` asks for, None if any will do; raises BadRequest."""
    given = request.headers.get("If-Match")
    if given is None or given.strip() == "*":
        return None
    revision = given.strip().strip('"')
    if not (revision.isascii() and revision.isdecimal() and len(revision) < 10):
        raise BadRequest(f"If-Match has value {given!r:.100}; expected the ETag, as GET gives it")
    return int(revision)
