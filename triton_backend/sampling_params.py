"""What a request may ask of decoding: names, types, ranges and defaults of every sampling parameter.

``FIELDS`` is the single table from which values are checked, coerced and documented. Names are vLLM's, with the aliases
that TensorRT-LLM clients send. A parameter that this engine does not know is ignored, because existing clients send
many; one that it knows but cannot honour is refused, because ignoring it would silently change the answer. Standard
library only: the control plane uses the same table.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from triton_backend.errors import InvalidRequest

MAX_STOP_STRINGS = 64
MAX_STOP_STRING_CHARS = 256
MAX_STOP_TOKEN_IDS = 1024


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to stop, for one request.

    Meaning follows Hugging Face ``generate`` (processors, then temperature, top-k, top-p, min-p); presence and
    frequency penalties count generated tokens only, as OpenAI and vLLM define them. ``temperature`` 0 is greedy;
    ``top_k`` 0 or -1 is off; ``logprobs`` None is off, 0 the chosen token only, k also the k most likely ones.
    """

    n: int = 1
    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    timeout_ms: int = 0

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> SamplingParams:
        """Build from what a client sent, over ``defaults`` (the model's generation_config).

        Raises InvalidRequest naming the parameter, its value and what is allowed.
        """
        wanted: dict[str, Any] = dict(defaults or {})
        for name, value in values.items():
            _refuse_unsupported(name, value)
            field_name = ALIASES.get(name, name)
            if field_name in FIELDS and value is not None:
                wanted[field_name] = FIELDS[field_name].parse(name, value)
        params = cls(**wanted)
        if params.min_tokens > params.max_tokens:
            raise InvalidRequest(
                f"min_tokens has value {params.min_tokens}; expected at most max_tokens = {params.max_tokens}"
            )
        return params


@dataclass(frozen=True)
class Number:
    """A whole number or a float within [low, high]; also as a string, as vLLM's clients send it."""

    kind: type
    low: float
    high: float

    def parse(self, name: str, value: Any) -> int | float:
        number = self._convert(value)
        if number is None or not self.low <= number <= self.high:
            raise InvalidRequest(f"{name} has value {_shown(value)}; expected {self}")
        return number

    def _convert(self, value: Any) -> int | float | None:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            return None
        try:
            if self.kind is int:
                is_whole = not isinstance(value, float) or value.is_integer()
                return int(value) if is_whole else None
            number = float(value)
        except (ValueError, OverflowError):
            return None
        return number if math.isfinite(number) else None

    def __str__(self) -> str:
        noun = "a whole number" if self.kind is int else "a number"
        return f"{noun} from {self.low:g} to {self.high:g}" if self.high < _LARGE else f"{noun} ≥ {self.low:g}"


@dataclass(frozen=True)
class Flag:
    """true or false; the strings "true" and "false" are accepted."""

    def parse(self, name: str, value: Any) -> bool:
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        if not isinstance(value, bool):
            raise InvalidRequest(f"{name} has value {_shown(value)}; expected {self}")
        return value

    def __str__(self) -> str:
        return "true or false"


@dataclass(frozen=True)
class Texts:
    """One string or a list of non-empty strings."""

    def parse(self, name: str, value: Any) -> tuple[str, ...]:
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
            raise InvalidRequest(f"{name} has value {_shown(value)}; expected {self}")
        if len(texts) > MAX_STOP_STRINGS:
            raise InvalidRequest(f"{name} has {len(texts)} entries; expected at most {MAX_STOP_STRINGS}")
        if any(len(text) > MAX_STOP_STRING_CHARS for text in texts):
            raise InvalidRequest(f"{name} has an entry over {MAX_STOP_STRING_CHARS} characters; make it shorter")
        # Clients of one-tensor-per-parameter backends send "" for "none".
        return tuple(text for text in texts if text)

    def __str__(self) -> str:
        return f"a string or a list of at most {MAX_STOP_STRINGS} strings"


@dataclass(frozen=True)
class TokenIds:
    """A list of whole numbers ≥ 0; ids outside the vocabulary are harmless, they never match."""

    def parse(self, name: str, value: Any) -> tuple[int, ...]:
        ids = [value] if isinstance(value, int) else value
        if not isinstance(ids, (list, tuple)) or not all(
            isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids
        ):
            raise InvalidRequest(f"{name} has value {_shown(value)}; expected {self}")
        if len(ids) > MAX_STOP_TOKEN_IDS:
            raise InvalidRequest(f"{name} has {len(ids)} entries; expected at most {MAX_STOP_TOKEN_IDS}")
        return tuple(ids)

    def __str__(self) -> str:
        return f"a list of at most {MAX_STOP_TOKEN_IDS} token ids ≥ 0"


_LARGE = 2**31 - 1
FIELDS: dict[str, Number | Flag | Texts | TokenIds] = {
    "n": Number(int, 1, 128),
    "max_tokens": Number(int, 1, _LARGE),
    "min_tokens": Number(int, 0, _LARGE),
    "temperature": Number(float, 0.0, 100.0),
    "top_k": Number(int, -1, _LARGE),
    "top_p": Number(float, 0.0, 1.0),
    "min_p": Number(float, 0.0, 1.0),
    "repetition_penalty": Number(float, 0.01, 100.0),
    "presence_penalty": Number(float, -2.0, 2.0),
    "frequency_penalty": Number(float, -2.0, 2.0),
    "seed": Number(int, -(2**63), 2**64 - 1),
    "stop": Texts(),
    "stop_token_ids": TokenIds(),
    "include_stop_str_in_output": Flag(),
    "ignore_eos": Flag(),
    "skip_special_tokens": Flag(),
    "logprobs": Number(int, 0, 64),
    "timeout_ms": Number(int, 0, _LARGE),
}
ALIASES = {
    "min_length": "min_tokens",
    "num_return_sequences": "n",
    "stop_words": "stop",
    "end_id": "stop_token_ids",
}
"""Names of other servers' clients for the same thing."""

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "adapter": (None, ""),
    "allowed_token_ids": (None, []),
    "bad_words": (None, [], "", [""]),
    "beam_width": (None, 0, 1),
    "best_of": (None, 1),
    "guided_decoding_guide": (None, ""),
    "logit_bias": (None, {}, []),
    "lora_name": (None, ""),
    "no_repeat_ngram_size": (None, 0),
    "num_beam_groups": (None, 1),
    "prompt_logprobs": (None, False),
    "response_format": (None,),
    "structured_outputs": (None,),
    "truncate_prompt_tokens": (None,),
    "typical_p": (None, 1.0),
    "use_beam_search": (None, False),
}
"""Known parameters that would change the answer if ignored, with the values that ask for nothing."""


def _refuse_unsupported(name: str, value: Any) -> None:
    if name in UNSUPPORTED and value not in UNSUPPORTED[name]:
        raise InvalidRequest(f"{name} has value {_shown(value)}, but this engine does not support it; leave it out")


def _shown(value: Any) -> str:
    """A client's value for an error message: JSON where possible, never longer than a line."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"
