"""What every HTTP response has in common: the shape of errors, the request id, security headers, the body limit.

Errors under /v1 look as OpenAI's: ``{"error": {"message", "type", "param", "code"}}``, so that its clients raise their
own exceptions for ours. Errors under /api are problem details (RFC 9457): ``{"type", "title", "status", "detail",
"code", "request_id"}``.
"""

from __future__ import annotations

import re
import uuid
from typing import Any

import structlog
from flask import Flask, Response, g, jsonify, request
from flask.json.provider import DefaultJSONProvider
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge
from werkzeug.http import HTTP_STATUS_CODES

from control_plane.databases import UNREACHABLE, reason_of
from control_plane.errors import ControlPlaneError, DatabaseUnavailable
from control_plane.settings import Settings

REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
API_PREFIX = "/api/"
RETRY_AFTER_S = 1
MAX_DISCARDED_BYTES = 16 << 20
DISCARD_CHUNK_BYTES = 64 << 10
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'self'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
HTTP_CODES = {400: "invalid_request", 404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}
_KINDS = {429: "rate_limit_error"}

log = structlog.get_logger(__name__)


def init_responses(app: Flask, settings: Settings) -> None:
    assert isinstance(app.json, DefaultJSONProvider)
    app.json.sort_keys = False
    app.json.ensure_ascii = False
    app.config["MAX_CONTENT_LENGTH"] = settings.request_limit_bytes
    app.before_request(_start_request)
    app.after_request(_add_headers)
    app.register_error_handler(ControlPlaneError, render_error)
    app.register_error_handler(HTTPException, _http_error)
    app.register_error_handler(Exception, _unexpected_error)
    for unreachable in UNREACHABLE:
        app.register_error_handler(unreachable, _database_error)


def read_body() -> bytes:
    """The whole request body; raises 413 if it is over the limit."""
    body = request.get_data(cache=False)
    # Werkzeug checks a Content-Length, but cuts a chunked body at the limit and says nothing.
    if request.content_length is None and len(body) >= (request.max_content_length or 0):
        raise RequestEntityTooLarge
    return body


def error_body(message: str, status: int, code: str) -> dict[str, Any]:
    kind = _KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def problem_body(message: str, status: int, code: str) -> dict[str, Any]:
    title = HTTP_STATUS_CODES.get(status, "Error")
    request_id = g.get("request_id")
    return {
        "type": "about:blank",
        "title": title,
        "status": status,
        "detail": message,
        "code": code,
        "request_id": request_id,
    }


def _start_request() -> None:
    given = request.headers.get("X-Request-Id", "")
    g.request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(request_id=g.request_id)


def _add_headers(response: Response) -> Response:
    response.headers["X-Request-Id"] = g.get("request_id", "")
    for name, value in SECURITY_HEADERS.items():
        # A page may need a policy of its own.
        response.headers.setdefault(name, value)
    return response


def render_error(error: ControlPlaneError) -> Response:
    """The error in the shape of the current path, with the headers that belong to its status."""
    response = _error_response(str(error), error.status, error.code)
    if error.status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    retry_after_s = RETRY_AFTER_S if error.status == 503 else error.retry_after_s
    if retry_after_s is not None:
        response.headers["Retry-After"] = str(retry_after_s)
    if error.status >= 500:
        log.warning("request_failed", path=request.path, status=error.status, code=error.code, reason=str(error))
    return response


def _http_error(error: HTTPException) -> Response:
    status = error.code or 500
    message = error.description or error.name
    if status == 413:
        message = f"the request body is too large; expected at most {request.max_content_length} bytes"
        _discard_rest()
        # A client that still sends after that is cut off, so this connection cannot carry another request.
        response = _error_response(message, status, HTTP_CODES[413])
        response.headers["Connection"] = "close"
        return response
    response = _error_response(message, status, HTTP_CODES.get(status, error.name.lower().replace(" ", "_")))
    # Such as Allow, without which a 405 does not say what is allowed.
    response.headers.update({name: value for name, value in error.get_headers() if name != "Content-Type"})
    return response


def _discard_rest() -> None:
    """Read on for a while: a connection closed while the client still sends shows it a reset, not the answer."""
    stream = request.environ["wsgi.input"]
    for _ in range(MAX_DISCARDED_BYTES // DISCARD_CHUNK_BYTES):
        if not stream.read(DISCARD_CHUNK_BYTES):
            return


def _database_error(error: Exception) -> Response:
    # Where the database is and what it said is for the log only.
    log.warning("database_unavailable", path=request.path, reason=reason_of(error))
    return render_error(DatabaseUnavailable("the database does not answer at the moment; try again"))


def _unexpected_error(error: Exception) -> Response:
    log.error("request_crashed", path=request.path, exc_info=error)
    # Details of what is our own fault are in the log only.
    message = f"internal error; the log has it under request id {g.get('request_id')}"
    return _error_response(message, 500, "internal_error")


def _error_response(message: str, status: int, code: str) -> Response:
    is_api = request.path.startswith(API_PREFIX)
    response = jsonify((problem_body if is_api else error_body)(message, status, code))
    if is_api:
        response.mimetype = "application/problem+json"
    response.status_code = status
    return response
