"""Routes under /v1: parse, one service call, render."""

from __future__ import annotations

import json
import select
import socket
from collections.abc import Callable, Generator, Iterator
from itertools import chain, islice
from typing import Any

import structlog
from apiflask import APIBlueprint
from flask import Response, current_app, jsonify, request

from control_plane.auth.limits import rate_limits
from control_plane.auth.principal import current_principal
from control_plane.auth.services import require_key
from control_plane.auth.watch import Watch
from control_plane.errors import (
    ClientGone,
    ControlPlaneError,
    ModelNotReady,
    NotFound,
    Overloaded,
    RequestTimeout,
    ServingError,
    TritonUnavailable,
)
from control_plane.gateway.answers import CompletionObject, ModelList, ModelObject
from control_plane.gateway.schemas import CompletionRequest, parse_completion
from control_plane.gateway.services import Completion, served_model, served_models
from control_plane.operations import EVENT_STREAM, Operation
from control_plane.registry.routing import Router, model_name
from control_plane.responses import error_body, read_body
from control_plane.settings import Settings
from control_plane.traffic.recorder import TrafficRecorder
from control_plane.triton import TritonClient

gateway = APIBlueprint("gateway", __name__, url_prefix="/v1")
VERSION_HEADER = "X-Model-Version"
log = structlog.get_logger(__name__)
COMPLETION_ERRORS = (
    NotFound,
    Overloaded,
    ModelNotReady,
    TritonUnavailable,
    ServingError,
    RequestTimeout,
    ClientGone,
)


@gateway.get("/models")
@require_key("viewer", "read", "generate")
@Operation(ModelList)
def list_models() -> dict[str, Any]:
    """Models whose production version is loaded, and that the key may use."""
    models = served_models(_router(), _settings())
    return {"object": "list", "data": [model for model in models if current_principal().may_use(model["id"])]}


@gateway.get("/models/<name>")
@require_key("viewer", "read", "generate")
@Operation(ModelObject, errors=(ModelNotReady,))
def get_model(name: str) -> dict[str, Any]:
    """One model that is ready; also by ``name@alias`` and ``name@version``."""
    current_principal().require_model(model_name(name))
    return served_model(_router(), _settings(), name)


@gateway.post("/completions")
@require_key("developer", "generate")
@Operation(
    CompletionObject,
    reads=CompletionRequest,
    errors=COMPLETION_ERRORS,
    sends={VERSION_HEADER: "the version that answered"},
    has_stream=True,
)
def create_completion() -> Response:
    """Complete a prompt, or several; streamed with ``stream``."""
    body, params = parse_completion(read_body())
    principal, limits = current_principal(), rate_limits()
    principal.require_model(model_name(body.model))
    limits.check_tokens(principal)
    completion = Completion(_triton(), _router(), _traffic(), _settings(), body, params, _is_abandoned())
    slots = current_app.extensions["completion_slots"]
    if not slots.acquire(blocking=False):
        raise Overloaded("every web thread for completions is busy; try again, or set LLMOS_WEB_THREADS higher")

    def end() -> None:
        slots.release()
        limits.spend_tokens(principal, completion.charged_tokens)

    try:
        response = _event_stream(completion.chunks()) if body.stream else jsonify(completion.whole())
    except BaseException:
        end()
        raise
    response.call_on_close(end)
    if completion.route is not None:
        response.headers[VERSION_HEADER] = str(completion.route.version)
    return response


def _event_stream(chunks: Generator[dict[str, Any], None, None]) -> Response:
    # The first chunk is awaited before the status line is sent, so early errors have a status of their own.
    first = list(islice(chunks, 1))
    response = Response(_events(chain(first, chunks)), content_type=f"{EVENT_STREAM}; charset=utf-8")
    response.headers["Cache-Control"] = "no-cache"
    response.headers["X-Accel-Buffering"] = "no"
    response.call_on_close(chunks.close)
    return response


def _events(chunks: Iterator[dict[str, Any]]) -> Iterator[str]:
    try:
        for chunk in chunks:
            yield _event(chunk)
        yield "data: [DONE]\n\n"
    except ClientGone:
        log.info("stream_abandoned")
    except ControlPlaneError as error:
        log.warning("stream_failed", code=error.code, reason=str(error))
        yield _event(error_body(str(error), error.status, error.code))
    except Exception as error:
        log.error("stream_crashed", exc_info=error)
        yield _event(error_body("internal error; the log has it", 500, "internal_error"))


def _event(document: dict[str, Any]) -> str:
    return f"data: {json.dumps(document, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _is_abandoned() -> Callable[[], bool]:
    """Whether the client hung up; raises what ends the answer if its key is revoked or expires meanwhile."""
    watch, hung_up = Watch(), _hung_up(request.environ.get("gunicorn.socket"))

    def is_abandoned() -> bool:
        watch.check()
        return hung_up()

    return is_abandoned


def _hung_up(connection: socket.socket | None) -> Callable[[], bool]:
    """Ask the operating system whether the client closed its connection; reads nothing of what it may have sent."""
    if connection is None:
        return lambda: False
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLRDHUP)
    # POLLHUP and POLLERR are reported without being asked for.
    return lambda: bool(poll.poll(0))


def _triton() -> TritonClient:
    return current_app.extensions["triton"]


def _router() -> Router:
    return current_app.extensions["router"]


def _traffic() -> TrafficRecorder:
    return current_app.extensions["traffic"]


def _settings() -> Settings:
    return current_app.config["SETTINGS"]
