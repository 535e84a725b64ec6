"""The wire: every tensor that enters or leaves the Triton model, and the typed messages they become.

One model accepts two dialects at once (both optional inputs of the same config): ``text_input`` with one JSON
``sampling_parameters``, as Triton's vLLM backend, and one tensor per parameter, as the TensorRT-LLM backend; token
ids may replace text. ``parse_request`` turns tensors into a frozen ``GenerateRequest``; ``response_tensors`` turns a
``GenerateResponse`` back. Neither knows Triton's Python API, so clients, the engine and tests share this one table.
Standard library only.

    precedence:  a parameter's own tensor  >  sampling_parameters  >  request parameters (unknown JSON keys of
    /generate)
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from triton_backend.errors import InvalidRequest
from triton_backend.sampling_params import ALIASES, FIELDS, OTHER_PARAMETERS, UNSUPPORTED, SamplingParams

MAX_PROMPT_BYTES = 4 << 20
MAX_PARAMETERS_BYTES = 4 << 20


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of the model's interface. ``dims`` are fixed by the contract: [1], or [-1] for lists."""

    name: str
    data_type: str
    dims: tuple[int, ...]
    meaning: str
    optional: bool = True


INPUTS: tuple[TensorSpec, ...] = (
    TensorSpec("text_input", "TYPE_STRING", (1,), "the prompt, UTF-8"),
    TensorSpec("input_ids", "TYPE_INT32", (-1,), "the prompt as token ids, instead of text_input"),
    TensorSpec("stream", "TYPE_BOOL", (1,), "many responses with deltas instead of one with everything"),
    TensorSpec("sampling_parameters", "TYPE_STRING", (1,), "JSON object; numbers may be strings"),
    TensorSpec(
        "exclude_input_in_output",
        "TYPE_BOOL",
        (1,),
        "leave the prompt out of text_output; default false, streams always leave it out",
    ),
    TensorSpec("return_finish_reason", "TYPE_BOOL", (1,), "adds finish_reason"),
    TensorSpec("return_cumulative_logprob", "TYPE_BOOL", (1,), "adds cumulative_logprob"),
    TensorSpec("return_logprobs", "TYPE_BOOL", (1,), "adds logprobs"),
    TensorSpec("return_num_input_tokens", "TYPE_BOOL", (1,), "adds num_input_tokens"),
    TensorSpec("return_num_output_tokens", "TYPE_BOOL", (1,), "adds num_output_tokens"),
    TensorSpec("return_token_ids", "TYPE_BOOL", (1,), "adds output_ids"),
    TensorSpec("return_metrics", "TYPE_BOOL", (1,), "adds request_metrics to the last response"),
    TensorSpec("health_probe", "TYPE_BOOL", (1,), "compute one token in a reserved cache row, ahead of the queue"),
    TensorSpec("max_tokens", "TYPE_INT32", (1,), "most tokens to generate"),
    TensorSpec("min_tokens", "TYPE_INT32", (1,), "fewest tokens before an end or stop token may be chosen"),
    TensorSpec("min_length", "TYPE_INT32", (1,), "same as min_tokens"),
    TensorSpec("temperature", "TYPE_FP32", (1,), "0 is greedy"),
    TensorSpec("top_k", "TYPE_INT32", (1,), "0 or -1 is off"),
    TensorSpec("top_p", "TYPE_FP32", (1,), "1 is off"),
    TensorSpec("min_p", "TYPE_FP32", (1,), "0 is off"),
    TensorSpec("repetition_penalty", "TYPE_FP32", (1,), "1 is off"),
    TensorSpec("presence_penalty", "TYPE_FP32", (1,), "0 is off"),
    TensorSpec("frequency_penalty", "TYPE_FP32", (1,), "0 is off"),
    TensorSpec("seed", "TYPE_UINT64", (1,), "same seed, same tokens"),
    TensorSpec("stop", "TYPE_STRING", (-1,), "strings that end the output"),
    TensorSpec("stop_words", "TYPE_STRING", (-1,), "same as stop"),
    TensorSpec("bad_words", "TYPE_STRING", (-1,), "strings that never occur in the output"),
    TensorSpec("end_id", "TYPE_INT32", (1,), "one more token id that ends the output"),
    TensorSpec("pad_id", "TYPE_INT32", (1,), "ignored: rows are never padded"),
    TensorSpec("num_return_sequences", "TYPE_INT32", (1,), "same as n"),
    TensorSpec("beam_width", "TYPE_INT32", (1,), "beams to search; 0 or 1 is none"),
    TensorSpec("length_penalty", "TYPE_FP32", (1,), "exponent of a beam's length, by which its score is divided"),
    TensorSpec("early_stopping", "TYPE_BOOL", (1,), "end when beam_width beams have ended"),
    TensorSpec("beam_search_diversity_rate", "TYPE_FP32", (1,), "same as diversity_penalty"),
    TensorSpec("guided_decoding_guide", "TYPE_STRING", (1,), "grammar that the output must follow"),
    TensorSpec("guided_decoding_guide_type", "TYPE_STRING", (1,), "json, json_schema, regex or ebnf_grammar"),
    TensorSpec("lora_name", "TYPE_STRING", (1,), "adapter to use"),
    TensorSpec("decoder_input_ids", "TYPE_INT32", (-1,), "how an encoder–decoder's output begins"),
    TensorSpec("return_log_probs", "TYPE_BOOL", (1,), "same as return_logprobs"),
    TensorSpec("return_sequence_scores", "TYPE_BOOL", (1,), "adds sequence_scores"),
)

OUTPUTS: tuple[TensorSpec, ...] = (
    TensorSpec("text_output", "TYPE_STRING", (-1,), "n texts; deltas when streaming", optional=False),
    TensorSpec("finish_reason", "TYPE_STRING", (-1,), '"None" until a sequence ends with "stop" or "length"'),
    TensorSpec("cumulative_logprob", "TYPE_FP32", (-1,), "sum of the chosen tokens' log probabilities, per sequence"),
    TensorSpec(
        "logprobs",
        "TYPE_STRING",
        (-1,),
        "per sequence a JSON list, one object per new token: {token_id: {logprob, rank, decoded_token}}; "
        "the generated token comes first and has a text_offset, too; a logprob of null is −∞",
    ),
    TensorSpec("num_input_tokens", "TYPE_UINT32", (1,), "length of the prompt"),
    TensorSpec("num_output_tokens", "TYPE_UINT32", (-1,), "new tokens in this response, per sequence"),
    TensorSpec("output_ids", "TYPE_INT32", (-1,), "new token ids of all sequences, one after the other"),
    TensorSpec(
        "request_metrics",
        "TYPE_STRING",
        (1,),
        "JSON: num_sequences, queue_s, prefill_s, decode_s, cached_tokens, preemptions, accepted_draft_tokens, "
        "engine_uptime_s, digest",
    ),
    TensorSpec(
        "prompt_logprobs",
        "TYPE_STRING",
        (1,),
        "with the parameter of that name, once: JSON list, null and then as logprobs, one per further prompt token",
    ),
    TensorSpec(
        "prompt_tokens",
        "TYPE_STRING",
        (1,),
        "with prompt_logprobs or return_prompt_tokens, once: JSON list, {token_id, decoded_token, text} per token of "
        "the prompt; texts join to the prompt",
    ),
    TensorSpec("sequence_scores", "TYPE_FP32", (-1,), "beams: cumulative_logprob / length ** length_penalty"),
)

_INPUT_BY_NAME = {spec.name: spec for spec in INPUTS}
# The plain booleans of GenerateRequest; every other input is a prompt or a sampling parameter.
_FLAG_INPUTS = tuple(spec.name for spec in INPUTS if spec.data_type == "TYPE_BOOL" and spec.name not in FIELDS)
_PARAMETER_INPUTS = tuple(
    spec.name
    for spec in INPUTS
    if spec.name not in _FLAG_INPUTS and spec.name not in ("text_input", "input_ids", "sampling_parameters")
)


@dataclass(frozen=True)
class GenerateRequest:
    """One parsed request, with a prompt either as ``text`` or, where that is None, as ``input_ids``."""

    request_id: str
    params: SamplingParams
    text: str | None = None
    input_ids: tuple[int, ...] = ()
    stream: bool = False
    exclude_input_in_output: bool = False
    return_finish_reason: bool = False
    return_cumulative_logprob: bool = False
    return_logprobs: bool = False
    return_num_input_tokens: bool = False
    return_num_output_tokens: bool = False
    return_token_ids: bool = False
    return_metrics: bool = False
    return_sequence_scores: bool = False
    health_probe: bool = False


@dataclass(frozen=True)
class TokenLogprob:
    """Log probability of one token; ``rank`` 1 is the most likely token of the vocabulary.

    ``text_offset``, of a token that was generated, is where it begins among the characters that its sequence generated,
    those of a stop string included. It cannot be told from ``decoded_token``: halves of characters and spaces at the
    beginning read otherwise alone.
    """

    token_id: int
    logprob: float
    rank: int
    decoded_token: str
    text_offset: int | None = None


@dataclass(frozen=True)
class PromptToken:
    """One token of the prompt, by itself and in the text: ``text`` is what it adds to the text that the prompt's tokens
    make, so all of them joined are that text. It is empty for special tokens, and until a character is whole.
    """

    token_id: int
    decoded_token: str
    text: str


@dataclass(frozen=True)
class SequenceOutput:
    """What one of a request's n sequences has new since the last response (everything, when not streaming).

    ``logprobs`` holds one tuple per new token, the chosen token first. ``finish_reason`` is None while it runs, then
    ``stop`` or ``length``. ``score`` is a beam's, with its length penalty.
    """

    index: int
    text: str
    token_ids: tuple[int, ...] = ()
    finish_reason: str | None = None
    cumulative_logprob: float = 0.0
    logprobs: tuple[tuple[TokenLogprob, ...], ...] = ()
    score: float | None = None


@dataclass(frozen=True)
class GenerateResponse:
    """One message to the client; ``finished`` on the last. An ``error`` (``CODE: message``) is always the last.

    ``prompt_logprobs`` and ``prompt_tokens`` come once, with the first response: the former is None for the first
    token, then one tuple per token.
    """

    request_id: str
    outputs: tuple[SequenceOutput, ...] = ()
    num_input_tokens: int = 0
    finished: bool = False
    metrics: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None
    prompt_logprobs: tuple[tuple[TokenLogprob, ...] | None, ...] | None = None
    prompt_tokens: tuple[PromptToken, ...] = ()


def parse_request(
    request_id: str,
    tensors: Mapping[str, Sequence[Any]],
    parameters: Mapping[str, Any] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> GenerateRequest:
    """Turn ``tensors`` (name → flat list of bytes, numbers or bools) into a request.

    ``parameters`` are Triton's request parameters, ``defaults`` the model's generation_config values. Raises
    InvalidRequest.
    """
    values = _given_parameters(tensors, parameters or {})
    flags = {name: bool(_single(name, tensors[name])) for name in _FLAG_INPUTS if name in tensors}
    flags["return_logprobs"] = flags.pop("return_log_probs", False) or flags.get("return_logprobs", False)
    if (flags["return_logprobs"] or flags.get("return_cumulative_logprob")) and values.get("logprobs") is None:
        values["logprobs"] = 0
    request = GenerateRequest(
        request_id=request_id,
        # A probe asks whether the model computes, not whether its defaults suit the version.
        params=SamplingParams.from_mapping(values, None if flags.get("health_probe") else defaults),
        text=_text(tensors),
        input_ids=tuple(int(i) for i in tensors.get("input_ids", ())),
        **flags,
    )
    _check(request, tensors)
    return request


def response_tensors(request: GenerateRequest, response: GenerateResponse) -> dict[str, list[Any]]:
    """Tensor name → flat list of what ``request`` asked to see of ``response``; the prompt is prepended where asked."""
    outputs = response.outputs
    prefix = "" if request.stream or request.exclude_input_in_output or request.text is None else request.text
    tensors: dict[str, list[Any]] = {"text_output": [prefix + output.text for output in outputs]}
    if request.return_finish_reason:
        tensors["finish_reason"] = [output.finish_reason or "None" for output in outputs]
    if request.return_cumulative_logprob:
        tensors["cumulative_logprob"] = [output.cumulative_logprob for output in outputs]
    if request.return_logprobs:
        tensors["logprobs"] = [json.dumps([_logprobs_json(token) for token in output.logprobs]) for output in outputs]
    if request.return_num_input_tokens:
        tensors["num_input_tokens"] = [response.num_input_tokens]
    if request.return_num_output_tokens:
        tensors["num_output_tokens"] = [len(output.token_ids) for output in outputs]
    if request.return_token_ids:
        tensors["output_ids"] = [token_id for output in outputs for token_id in output.token_ids]
    if request.return_sequence_scores:
        tensors["sequence_scores"] = [output.score or 0.0 for output in outputs]
    if response.prompt_logprobs is not None:
        tensors["prompt_logprobs"] = [
            json.dumps([token and _logprobs_json(token) for token in response.prompt_logprobs])
        ]
    if response.prompt_tokens:
        tensors["prompt_tokens"] = [json.dumps([dataclasses.asdict(token) for token in response.prompt_tokens])]
    if request.return_metrics and response.finished:
        tensors["request_metrics"] = [json.dumps(dict(response.metrics))]
    return tensors


def _logprobs_json(alternatives: tuple[TokenLogprob, ...]) -> dict[str, dict[str, Any]]:
    documents = {}
    for token in alternatives:
        # JSON has no −∞, which a token has that the model itself rules out.
        logprob = token.logprob if math.isfinite(token.logprob) else None
        document = {"logprob": logprob, "rank": token.rank, "decoded_token": token.decoded_token}
        offset = {} if token.text_offset is None else {"text_offset": token.text_offset}
        documents[str(token.token_id)] = {**document, **offset}
    return documents


def _given_parameters(tensors: Mapping[str, Sequence[Any]], parameters: Mapping[str, Any]) -> dict[str, Any]:
    known = {*FIELDS, *ALIASES, *OTHER_PARAMETERS, *UNSUPPORTED, *_PARAMETER_INPUTS}
    values = _with_end_id({name: value for name, value in parameters.items() if name in known})
    if "sampling_parameters" in tensors:
        given = _sampling_parameters(_single("sampling_parameters", tensors["sampling_parameters"]))
        values = _over(values, _with_end_id(given))
    own: dict[str, Any] = {}
    for name in _PARAMETER_INPUTS:
        if name in tensors:
            spec = _INPUT_BY_NAME[name]
            items = [_decode(name, i) if spec.data_type == "TYPE_STRING" else i for i in tensors[name]]
            own[name] = items if spec.dims == (-1,) else _single(name, items)
    end_id = own.pop("end_id", None)
    values = _over(values, own)
    return values if end_id is None else _with_end_id({**values, "end_id": end_id})


def _with_end_id(values: dict[str, Any]) -> dict[str, Any]:
    """``end_id`` is one more of ``stop_token_ids``; -1 is none."""
    if "end_id" not in values:
        return values
    values = dict(values)
    end_id, others = values.pop("end_id"), values.get("stop_token_ids") or []
    if end_id in (-1, "-1", None):
        return values
    return {**values, "stop_token_ids": [*(others if isinstance(others, (list, tuple)) else [others]), end_id]}


def _over(values: dict[str, Any], stronger: dict[str, Any]) -> dict[str, Any]:
    """``stronger`` wins under whichever of a parameter's names either has it."""
    fields = {ALIASES.get(name, name) for name in stronger}
    return {name: value for name, value in values.items() if ALIASES.get(name, name) not in fields} | stronger


def _sampling_parameters(encoded: bytes | str) -> dict[str, Any]:
    if len(encoded) > MAX_PARAMETERS_BYTES:
        raise InvalidRequest(f"sampling_parameters has {len(encoded)} bytes; expected at most {MAX_PARAMETERS_BYTES}")
    text = _decode("sampling_parameters", encoded)
    try:
        values = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"sampling_parameters is not valid JSON ({error}); expected an object") from error
    if not isinstance(values, dict):
        raise InvalidRequest(f"sampling_parameters is a JSON {type(values).__name__}; expected an object")
    return values


def _single(name: str, items: Sequence[Any]) -> Any:
    if len(items) != 1:
        raise InvalidRequest(f"{name} has {len(items)} values; expected exactly 1")
    return items[0]


def _decode(name: str, value: bytes | str) -> str:
    if isinstance(value, str):
        return value
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"{name} is not valid UTF-8 (byte 0x{value[error.start]:02x} at offset {error.start}); encode it as UTF-8"
        ) from None


def _text(tensors: Mapping[str, Sequence[Any]]) -> str | None:
    if "text_input" not in tensors:
        return None
    value = _single("text_input", tensors["text_input"])
    if len(value) > MAX_PROMPT_BYTES:
        raise InvalidRequest(f"text_input has {len(value)} bytes; expected at most {MAX_PROMPT_BYTES}")
    return _decode("text_input", value)


def _check(request: GenerateRequest, tensors: Mapping[str, Sequence[Any]]) -> None:
    if request.text is None and "input_ids" not in tensors:
        raise InvalidRequest("text_input is missing; expected text_input or input_ids")
    if request.text is not None and "input_ids" in tensors:
        raise InvalidRequest("text_input and input_ids are both given; expected one of them")
    params = request.params
    if request.stream and (params.best_of or params.n) > params.n:
        raise InvalidRequest(
            f"best_of has value {params.best_of} and stream is true, but which {params.n} are best is known at the end "
            "only; leave one of them out"
        )
    if request.stream and tensors.get("exclude_input_in_output") and not request.exclude_input_in_output:
        raise InvalidRequest("exclude_input_in_output is false, but streams never repeat the prompt; leave it out")
    if request.health_probe and (params.max_tokens != 1 or params.n != 1 or params.adapter):
        raise InvalidRequest("health_probe needs max_tokens = 1, n = 1 and no adapter")
