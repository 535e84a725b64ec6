"""Reading what a client of the REST API sent: bodies by their schema, numbers of the query."""

from __future__ import annotations

from typing import TypeVar

from flask import request
from pydantic import BaseModel, ValidationError

from control_plane.errors import BadRequest
from control_plane.responses import read_body

MAX_TEXT = 200

Body = TypeVar("Body", bound=BaseModel)


def parse_body(schema: type[Body]) -> Body:
    """Raises BadRequest naming the first field that is not as expected."""
    try:
        return schema.model_validate_json(read_body())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(map(str, first["loc"])) or "the body"
        raise BadRequest(f"{name} is not as expected: {first['msg']}") from None


def whole_number(name: str, default: int, *, least: int = 1, most: int = 2**63 - 1) -> int:
    """A parameter of the query; raises BadRequest."""
    text = request.args.get(name)
    if text is None:
        return default
    # Digits of ASCII only: int() takes others, too.
    if not (text.isascii() and text.isdecimal() and len(text) < 20 and least <= int(text) <= most):
        raise BadRequest(f"{name} has value {text!r:.100}; expected a whole number from {least} to {most}")
    return int(text)


def text(name: str) -> str | None:
    """A parameter of the query; raises BadRequest for what no name of ours can be."""
    value = request.args.get(name)
    if value is not None and not (len(value) <= MAX_TEXT and value.isprintable()):
        raise BadRequest(f"{name} has value {value!r:.100}; expected at most {MAX_TEXT} printable characters")
    return value
