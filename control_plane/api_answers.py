"""What the control plane answers, to those who ask it over HTTP: documents one by one, or why there are none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx

from control_plane.errors import ControlPlaneError

Document = dict[str, Any]


class ApiError(ControlPlaneError):
    """The server said no; ``status`` and ``code`` are its own."""

    def __init__(self, message: str, status: int, code: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class Unreachable(ApiError):
    """There is nobody to ask: what was asked was not done."""


def error_of(response: httpx.Response) -> ApiError:
    """What a response with an error status says; also of one that is not llmos's."""
    try:
        return refusal(response.json(), response.status_code)
    except (ValueError, KeyError, TypeError):
        message = f"{response.request.url} answered {response.status_code} and not why; is it llmos that listens there?"
        return ApiError(message, response.status_code, "http_error")


def refusal(document: Document, status: int) -> ApiError:
    """From a problem document, or from OpenAI's error object."""
    if "error" in document:
        return ApiError(document["error"]["message"], status, str(document["error"]["code"]))
    return ApiError(document["detail"], document.get("status", status), document["code"])


def _lines(response: httpx.Response) -> Iterator[str]:
    """Those of an event stream; httpx's own also end at characters that may stand inside of JSON, as U+2028."""
    rest = b""
    for data in response.iter_bytes():
        *lines, rest = (rest + data).split(b"\n")
        yield from (line.decode() for line in lines)


def documents(response: httpx.Response) -> Iterator[Document]:
    """Those of an event stream, as they come; raises ApiError for the one that says why it ends."""
    is_error = False
    for line in _lines(response):
        if line == "event: error":
            is_error = True
        elif line.startswith("data: {"):
            document = json.loads(line.removeprefix("data: "))
            if is_error:
                raise refusal(document, response.status_code)
            yield document
