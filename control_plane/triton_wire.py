"""What goes over the wire to Triton and back: typed calls become gRPC messages, tensors become typed responses.

Pure functions, so they are tested without a server. Tensor names come from ``triton_backend.protocol``. Errors of the
engine begin with their code (``INVALID_ARG: …``), because Triton's streams keep only an error's text; everything else
is one of Triton's own sentences.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2
from tritonclient.utils import deserialize_bytes_tensor, triton_to_np_dtype

from control_plane.errors import (
    BadRequest,
    ClientTimeout,
    ControlPlaneError,
    ModelNotReady,
    NotFound,
    Overloaded,
    RequestTimeout,
    ServingError,
    TritonUnavailable,
)
from triton_backend.protocol import GenerateResponse, PromptToken, SequenceOutput, TokenLogprob


@dataclass(frozen=True)
class IndexEntry:
    """One version of one model as Triton sees it; ``state`` is READY, LOADING, UNLOADING, UNAVAILABLE or empty."""

    name: str
    version: str
    state: str
    reason: str

    @property
    def is_ready(self) -> bool:
        return self.state == "READY"

    @property
    def version_number(self) -> int:
        """0 for a model that was never loaded."""
        return int(self.version or 0)


@dataclass(frozen=True)
class ProbeResult:
    """An engine computed one token. ``digest`` names the version folder that it serves."""

    latency_s: float
    engine_uptime_s: float
    digest: str


@dataclass(frozen=True)
class GenerateCall:
    """One validated request. ``sampling`` holds only what the client named: else the model's own defaults apply.

    ``model`` is a model of Triton; without a ``version`` its highest loaded one answers.
    """

    model: str
    version: int | None = None
    text: str | None = None
    input_ids: tuple[int, ...] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)
    stream: bool = False
    exclude_input_in_output: bool = True
    return_logprobs: bool = False
    health_probe: bool = False
    request_id: str = ""


def infer_request(call: GenerateCall) -> service_pb2.ModelInferRequest:
    """The only place where a request to a model is built."""
    version = "" if call.version is None else str(call.version)
    request = service_pb2.ModelInferRequest(model_name=call.model, model_version=version, id=call.request_id)
    # Without it, a request that ends with no data would end with no message at all.
    request.parameters["triton_enable_empty_final_response"].bool_param = True
    if call.text is not None:
        _add(request, "text_input", "BYTES", 1, _bytes_element(call.text))
    else:
        ids = np.asarray(call.input_ids, dtype=np.int32)
        _add(request, "input_ids", "INT32", len(ids), ids.tobytes())
    _add(request, "sampling_parameters", "BYTES", 1, _bytes_element(json.dumps(dict(call.sampling))))
    flags = {
        "stream": call.stream,
        "exclude_input_in_output": call.exclude_input_in_output,
        "return_finish_reason": True,
        "return_num_input_tokens": True,
        "return_num_output_tokens": True,
        "return_token_ids": True,
        "return_metrics": True,
        "return_logprobs": call.return_logprobs,
        "health_probe": call.health_probe,
    }
    for name, flag in flags.items():
        if flag:
            _add(request, name, "BOOL", 1, b"\x01")
    return request


def generate_response(response: service_pb2.ModelInferResponse) -> GenerateResponse:
    """Typed form of one response; an empty final response has no outputs."""
    tensors = _tensors(response)
    texts = tensors.get("text_output", [])
    reasons = tensors.get("finish_reason", ["None"] * len(texts))
    counts = tensors.get("num_output_tokens", [0] * len(texts))
    logprobs = tensors.get("logprobs", [""] * len(texts))
    ids = iter(tensors.get("output_ids", []))
    outputs = tuple(
        SequenceOutput(
            index=index,
            text=text,
            token_ids=tuple(islice(ids, count)),
            finish_reason=None if reason == "None" else reason,
            logprobs=tuple(map(_alternatives, json.loads(alternatives or "[]"))),
        )
        for index, (text, count, reason, alternatives) in enumerate(zip(texts, counts, reasons, logprobs, strict=True))
    )
    return GenerateResponse(
        request_id=response.id,
        outputs=outputs,
        num_input_tokens=next(iter(tensors.get("num_input_tokens", [])), 0),
        finished=response.parameters["triton_final_response"].bool_param,
        metrics=json.loads(tensors["request_metrics"][0]) if "request_metrics" in tensors else {},
        prompt_logprobs=_prompt_logprobs(tensors["prompt_logprobs"][0]) if "prompt_logprobs" in tensors else None,
        prompt_tokens=tuple(PromptToken(**token) for token in json.loads(tensors.get("prompt_tokens", ["[]"])[0])),
    )


def error_from_text(text: str) -> ControlPlaneError:
    """The exception for an error message of the engine (``CODE: …``) or of Triton itself."""
    code, separator, message = text.partition(": ")
    if separator and code in _ENGINE_ERRORS:
        return _ENGINE_ERRORS[code](message)
    if re.search(r"unknown model: .* is not found", text):
        return NotFound(text)
    if re.search(r"unknown model: .* has no available versions|is not ready|not at ready state", text):
        return ModelNotReady(text)
    return ServingError(text)


def error_from_rpc(error: grpc.RpcError, url: str) -> ControlPlaneError:
    """The exception for a call that ended with a gRPC status."""
    code, details = error.code(), error.details() or ""
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return RequestTimeout(f"Triton at {url} did not answer in time")
    if "protocol is restricted" in details:
        return ServingError(f"Triton at {url} refused the admin key: {details}")
    if code is grpc.StatusCode.UNAVAILABLE:
        return TritonUnavailable(f"Triton at {url} does not answer ({details})")
    return error_from_text(details or f"Triton at {url} ended the call with {code.name} and no reason")


_ENGINE_ERRORS: dict[str, type[ControlPlaneError]] = {
    "INVALID_ARG": BadRequest,
    "UNAVAILABLE": Overloaded,
    # The engine has no deadline of its own: only the request's timeout_ms ends one that somebody waits for.
    "CANCELLED": ClientTimeout,
    "INTERNAL": ServingError,
}


def _add(request: service_pb2.ModelInferRequest, name: str, datatype: str, length: int, raw: bytes) -> None:
    request.inputs.add(name=name, datatype=datatype, shape=[length])
    request.raw_input_contents.append(raw)


def _bytes_element(text: str) -> bytes:
    try:
        raw = text.encode()
    except UnicodeEncodeError as error:
        raise BadRequest(f"the text holds half a character ({error.reason}) and cannot be encoded as UTF-8") from None
    return struct.pack("<I", len(raw)) + raw


def _tensors(response: service_pb2.ModelInferResponse) -> dict[str, list[Any]]:
    """Tensor name → flat list of str, int or float."""
    tensors = {}
    for output, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        if output.datatype == "BYTES":
            items = [item.decode("utf-8", errors="replace") for item in deserialize_bytes_tensor(raw)]
        else:
            items = np.frombuffer(raw, dtype=triton_to_np_dtype(output.datatype)).tolist()
        tensors[output.name] = items
    return tensors


def _prompt_logprobs(text: str) -> tuple[tuple[TokenLogprob, ...] | None, ...]:
    """None for the first token, which nothing predicts."""
    return tuple(token and _alternatives(token) for token in json.loads(text))


def _alternatives(token: Mapping[str, Mapping[str, Any]]) -> tuple[TokenLogprob, ...]:
    """What could stand at one place, the chosen token first, from {token_id: {logprob, rank, decoded_token}}."""
    return tuple(
        TokenLogprob(**{**values, "token_id": int(token_id), "logprob": _from_json(values["logprob"])})
        for token_id, values in token.items()
    )


def _from_json(logprob: float | None) -> float:
    return -math.inf if logprob is None else logprob
