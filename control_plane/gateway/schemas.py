"""What a client may send to /v1/completions, checked and typed.

The structure is checked by pydantic, every sampling parameter by itself by the engine's own table
(``triton_backend.sampling_params``), so both doors say the same about the same value. What values must be to each other
the engine checks, which knows what the model's own defaults are. Unknown fields are tolerated, because clients send
many; fields that are known and would change the answer if ignored are refused by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema

from control_plane.errors import BadRequest, NotFound
from triton_backend.errors import InvalidRequest
from triton_backend.sampling_params import ALIASES, FIELDS, OTHER_PARAMETERS, UNSUPPORTED, SamplingParams

MAX_PROMPTS = 256
MAX_TOKEN_ID = 2**31 - 1
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}(@[A-Za-z0-9][A-Za-z0-9._-]{0,127})?")
"""A model, or one of its aliases or versions: chat, chat@canary, chat@3."""

REFUSED: dict[str, tuple[Any, ...]] = {
    **UNSUPPORTED,
    "add_special_tokens": (None, True),
    "prompt_embeds": (None,),
    "return_tokens_as_token_ids": (None, False),
    "suffix": (None, ""),
}
"""Known to OpenAI or vLLM, not to us, with the values that ask for nothing."""
_ENGINE_PARAMETERS = {*FIELDS, *ALIASES, *OTHER_PARAMETERS}


_TOKEN_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": MAX_TOKEN_ID}, "minItems": 1}
PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MAX_PROMPTS},
        _TOKEN_IDS,
        {"type": "array", "items": _TOKEN_IDS, "minItems": 1, "maxItems": MAX_PROMPTS},
    ]
}
"""What ``parse_prompts`` takes."""


@dataclass(frozen=True)
class Prompt:
    """One prompt: its text, or its token ids."""

    text: str | None = None
    token_ids: tuple[int, ...] = ()


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


def parse_prompts(value: Any) -> tuple[Prompt, ...]:
    """A string, a list of strings, a list of token ids, or a list of lists of token ids."""
    if isinstance(value, str):
        return (Prompt(text=value),)
    if _is_token_ids(value):
        return (Prompt(token_ids=tuple(value)),)
    if isinstance(value, list) and 0 < len(value) <= MAX_PROMPTS:
        if all(isinstance(item, str) for item in value):
            return tuple(Prompt(text=item) for item in value)
        if all(_is_token_ids(item) for item in value):
            return tuple(Prompt(token_ids=tuple(item)) for item in value)
    raise ValueError(
        f"a string, a list of 1 to {MAX_PROMPTS} strings, a list of token ids, or a list of lists of token ids"
    )


def _add_sampling_parameters(schema: dict[str, Any]) -> None:
    schema["properties"] |= {name: {**kind.schema(), "description": str(kind)} for name, kind in FIELDS.items()}


class CompletionRequest(BaseModel):
    """OpenAI's legacy completions with vLLM's additions; every sampling parameter stays in ``model_extra``."""

    model_config = ConfigDict(strict=True, extra="allow", json_schema_extra=_add_sampling_parameters)

    model: str
    prompt: Annotated[tuple[Prompt, ...], BeforeValidator(parse_prompts), WithJsonSchema(PROMPT_SCHEMA)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=64)] | None = None
    return_token_ids: bool | None = None
    user: str | None = None

    @property
    def sampling(self) -> dict[str, Any]:
        """The sampling parameters that the client named, under the engine's names."""
        values = dict(self.model_extra or {})
        # The engine computes at least one token; of a prompt alone nobody sees it.
        values["max_tokens"] = 1 if self.is_prompt_only else self._max_tokens
        if self.logprobs is not None:
            values["logprobs"] = self.logprobs
        if self.needs_prompt_tokens:
            values["return_prompt_tokens"] = True
        asked = [num for num in (self.prompt_logprobs, self.logprobs if self.echo else None) if num is not None]
        if asked:
            values["prompt_logprobs"] = max(asked)
        return {name: value for name, value in values.items() if name in _ENGINE_PARAMETERS and value is not None}

    @property
    def is_prompt_only(self) -> bool:
        """Whether ``echo`` asks for the prompt and ``max_tokens`` 0 for nothing behind it."""
        return bool(self.echo) and type(self._max_tokens) is int and self._max_tokens == 0

    @property
    def is_truncated(self) -> bool:
        """Whether the engine may read less of a prompt than the client sent."""
        return (self.model_extra or {}).get("truncate_prompt_tokens") is not None

    @property
    def echoes_tokens(self) -> bool:
        """Whether the echo takes more than the text that the client sent."""
        has_ids = any(prompt.text is None for prompt in self.prompt)
        return bool(self.echo) and (self.logprobs is not None or has_ids or self.is_truncated)

    @property
    def needs_prompt_tokens(self) -> bool:
        """Whether only the engine knows what of the prompt is to be answered."""
        has_text = any(prompt.text is not None for prompt in self.prompt)
        return self.echoes_tokens or (bool(self.return_token_ids) and (has_text or self.is_truncated))

    @property
    def _max_tokens(self) -> Any:
        values = self.model_extra or {}
        return values.get("max_completion_tokens") if values.get("max_tokens") is None else values["max_tokens"]

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        return self.include_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)


def parse_completion(body: bytes) -> tuple[CompletionRequest, SamplingParams]:
    """Parse and check a request body; raises BadRequest naming field, value and expectation.

    The SamplingParams are what the client named over the engine's own defaults; the model's are not known here.
    """
    document = _json_object(body)
    try:
        request = CompletionRequest.model_validate(document)
        _refuse(request.model_extra or {})
        params = _parsed(request.sampling)
    except ValidationError as error:
        raise BadRequest(_sentence(error)) from None
    except InvalidRequest as error:
        raise BadRequest(error.args[0]) from None
    if request.echoes_tokens and params.decoder_input_ids:
        raise BadRequest("decoder_input_ids and echo are both given, but what is echoed is the prompt; leave one out")
    if not MODEL_NAME.fullmatch(request.model):
        raise NotFound(f"model {request.model!r:.200} does not exist; GET /v1/models lists those that do")
    return request, params


def _json_object(body: bytes) -> dict[str, Any]:
    try:
        document = json.loads(body)
        # A lone surrogate (half of an emoji, "\ud83d") is valid JSON but no text: nothing can encode it.
        if b"\\ud" in body.lower():
            json.dumps(document, ensure_ascii=False).encode()
    except UnicodeError as error:
        raise BadRequest(f"the body is not valid UTF-8 text ({error}); encode it as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not valid JSON ({error}); expected an object") from None
    if not isinstance(document, dict):
        raise BadRequest(f"the body is a JSON {type(document).__name__}; expected an object")
    return document


def _refuse(values: Mapping[str, Any]) -> None:
    for name, neutral in REFUSED.items():
        if name in values and values[name] not in neutral:
            raise BadRequest(f"{name} has value {_shown(values[name])}, but it is not supported; leave it out")


def _parsed(sampling: Mapping[str, Any]) -> SamplingParams:
    fields = {name: ALIASES.get(name, name) for name in sampling}
    values: dict[str, Any] = {
        field: FIELDS[field].parse(name, sampling[name]) for name, field in fields.items() if field in FIELDS
    }
    return SamplingParams(**values)


def _is_token_ids(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(type(item) is int and 0 <= item <= MAX_TOKEN_ID for item in value)
    )


def _sentence(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    # Steps inside a union (…, 'constrained-int') mean nothing to a client.
    name = ".".join(str(step) for step in first["loc"] if str(step) not in ("constrained-int", "int", "bool"))
    expected = first["msg"].removeprefix("Value error, ").replace("Input should be ", "")
    if first["type"] == "missing":
        return f"{name} is missing; it is required"
    return f"{name} has value {_shown(first['input'])}; expected {expected}"


def _shown(value: Any) -> str:
    text = json.dumps(value, default=repr)
    return text if len(text) <= 80 else text[:77] + "…"
