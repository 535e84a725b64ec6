"""What routes of the REST API have in common: bodies, parameters of the query and headers by their schema, pages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, TypeVar

from flask import request
from pydantic import BaseModel, BeforeValidator, Field, ValidationError
from werkzeug.datastructures import Headers

from control_plane.errors import BadRequest
from control_plane.responses import read_body

MAX_TEXT = 200
MAX_PAGE = 200
LARGEST = 2**63 - 1

Given = TypeVar("Given", bound=BaseModel)
Row = TypeVar("Row")


def _from_digits(value: Any) -> Any:
    # Digits of ASCII only: int() takes others, signs and underscores, too.
    if isinstance(value, str) and not (value.isascii() and value.isdecimal() and len(value) < 20):
        raise ValueError("expected a whole number")
    return value


def _from_json(value: Any) -> Any:
    # JSON does not tell 3 from 3.0.
    return int(value) if isinstance(value, float) and value.is_integer() else value


# Written last, behind the bounds: ``Annotated[int, Field(ge=1), FROM_DIGITS]``.
FROM_DIGITS = BeforeValidator(_from_digits)
"""A whole number in a query or a header."""
FROM_JSON = BeforeValidator(_from_json)
"""A whole number in a body of a strict schema."""
WITHOUT_NUL = r"^[^\x00]*$"
"""Pattern of what both databases can store."""
Limit = Annotated[int, Field(ge=1, le=MAX_PAGE), FROM_DIGITS]
Text = Annotated[str, Field(max_length=MAX_TEXT, pattern=r"^[^\x00-\x1f\x7f]*$")]
"""A text in a query: no longer than any name of ours, without control characters."""


class PageQuery(BaseModel):
    """What every list takes; its own filters, and where the page begins, are added to it."""

    limit: Limit = Field(50, description="most rows to give")


class IfMatch(BaseModel):
    """``revision`` is the one that an edit is meant for; None if any will do. Proxies that compress make ETags weak."""

    if_match: str | None = Field(
        None,
        alias="If-Match",
        pattern=r'^(\*|(W/)?"[0-9]{1,9}"|[0-9]{1,9})$',
        description="the ETag that was read, or *",
    )

    @property
    def revision(self) -> int | None:
        return None if self.if_match in (None, "*") else int(self.if_match.removeprefix("W/").strip('"'))


def parse_body(schema: type[Given]) -> Given:
    """Raises BadRequest naming the first field that is not as expected."""
    try:
        return schema.model_validate_json(read_body())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(map(str, first["loc"])) or "the body"
        raise BadRequest(f"{name} is not as expected: {first['msg']}") from None


def parse_query(schema: type[Given]) -> Given:
    """The parameters of the query that ``schema`` has; raises BadRequest naming the first bad one."""
    return _parse_texts(schema, request.args)


def parse_headers(schema: type[Given]) -> Given:
    """The headers that ``schema`` has, by the aliases of its fields; raises BadRequest naming the first bad one."""
    return _parse_texts(schema, request.headers)


def _parse_texts(schema: type[Given], given: Mapping[str, str] | Headers) -> Given:
    names = [field.alias or name for name, field in schema.model_fields.items()]
    try:
        return schema.model_validate({name: given[name] for name in names if name in given})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name, value = first["loc"][0], first["input"]
        if first["type"] == "missing":
            raise BadRequest(f"{name} is missing; it is required") from None
        expected = first["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
        raise BadRequest(f"{name} has value {value!r:.100}; {expected}") from None


def page(rows: Sequence[Row], limit: int, render: Callable[[Row], Any] = lambda row: row) -> dict[str, Any]:
    """One page of a list; ``rows`` were read with one more than ``limit``, which tells whether there is another."""
    return {"data": [render(row) for row in rows[:limit]], "has_more": len(rows) > limit}
