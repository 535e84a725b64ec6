"""What a request may ask of decoding: names, types, ranges and defaults of every sampling parameter.

``FIELDS`` is the single table from which values are checked, coerced and documented. Names are vLLM's, with the aliases
that other servers' clients send. A parameter that this engine does not know is ignored, because existing clients send
many; one that it knows but cannot honour is refused, because ignoring it would silently change the answer. Standard
library only: the control plane uses the same table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from triton_backend.errors import InvalidRequest
from triton_backend.grammar_params import GRAMMAR_PARAMETERS, GrammarSpec, grammar_from
from triton_backend.parameter_kinds import LARGE, Biases, Flag, Number, Text, Texts, TokenIds, shown

MIN_TEMPERATURE = 1e-5
"""Lower ones above 0 count as this one: logits divided by less are infinite, and the likeliest token wins anyway."""


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to stop, for one request.

    Meaning follows Hugging Face ``generate`` (processors, then temperature, top-k, top-p, min-p, typical-p); presence
    and frequency penalties count generated tokens only, as OpenAI and vLLM define them. ``temperature`` 0 is greedy;
    ``top_k`` 0 or -1 is off; ``logprobs`` None is off, 0 the chosen token only, k also the k most likely ones.
    ``best_of`` sequences are sampled and the ``n`` most likely returned. Lower ``priority`` runs earlier.

    With ``beam_width`` > 1 the ``n`` best beams are returned; they are chosen without sampling unless ``do_sample``.
    """

    n: int = 1
    best_of: int | None = None
    max_tokens: int = 16
    min_tokens: int = 0
    do_sample: bool | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str, ...] = ()
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    return_prompt_tokens: bool = False
    truncate_prompt_tokens: int | None = None
    decoder_input_ids: tuple[int, ...] = ()
    priority: int = 0
    timeout_ms: int = 0
    beam_width: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    num_beam_groups: int = 1
    diversity_penalty: float = 0.0
    adapter: str | None = None
    grammar: GrammarSpec | None = None

    @property
    def is_beam(self) -> bool:
        return self.beam_width > 1

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def num_sequences(self) -> int:
        """Sequences that run at once, each in a cache row."""
        return self.beam_width if self.is_beam else self.best_of or self.n

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> SamplingParams:
        """Build from what a client sent, over ``defaults`` (the model's generation_config).

        Raises InvalidRequest naming the parameter, its value and what is allowed.
        """
        given: dict[str, Any] = {}
        for name, value in values.items():
            _refuse_unsupported(name, value)
            field_name = ALIASES.get(name, name)
            if field_name in FIELDS and value is not None:
                parsed = FIELDS[field_name].parse(name, value)
                known = given.get(field_name)
                if known in _NOTHING:
                    given[field_name] = parsed
                elif parsed not in _NOTHING and parsed != known:
                    raise InvalidRequest(
                        f"{name} has value {shown(value)}, but it is {field_name}, which is given as "
                        f"{shown(given[field_name])}; give one of them"
                    )
        given["beam_width"] = _beam_width(given, values, defaults or {})
        given["grammar"] = grammar_from(values)
        params = cls(**{**(defaults or {}), **given})
        is_search = params.is_beam or _wants_beam_search(values)
        if is_search and params.do_sample is not True:
            params = _without_sampling(params, given)
        elif params.do_sample is False:
            params = dataclasses.replace(params, temperature=0.0)
        if 0.0 < params.temperature < MIN_TEMPERATURE:
            params = dataclasses.replace(params, temperature=MIN_TEMPERATURE)
        _check(params)
        return params


def _beam_width(given: Mapping[str, Any], values: Mapping[str, Any], defaults: Mapping[str, Any]) -> int:
    """A width that was asked for; the model's own only for a request that asks for nothing which beams exclude."""
    if "beam_width" in given:
        return max(1, given["beam_width"])
    if values.get("use_beam_search") is not None:
        return int(given.get("n", 1)) if _wants_beam_search(values) else 1
    excluding = given.keys() & {*_SAMPLING, "best_of", "do_sample"} or given.get("logprobs")
    width = int(defaults.get("beam_width", 1))
    return 1 if excluding or given.get("n", 1) > width else width


def _wants_beam_search(values: Mapping[str, Any]) -> bool:
    """vLLM's clients name no width: as many beams as sequences are returned, and one beam is greedy."""
    flag = values.get("use_beam_search")
    return flag is not None and Flag().parse("use_beam_search", flag) is True


_NOTHING = (None, ())
"""Parsed values that ask for nothing, as an empty list of stop strings."""
_SAMPLING: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0}
"""Parameters that only sampling uses, with the values that change nothing."""


def _without_sampling(params: SamplingParams, given: Mapping[str, Any]) -> SamplingParams:
    for name, neutral in _SAMPLING.items():
        value = given.get(name, neutral)
        is_off = value == neutral or (name == "temperature" and value == 0) or (name == "top_k" and value <= 1)
        if not is_off:
            raise InvalidRequest(
                f"{name} has value {value} and beam_width has value {params.beam_width}, but beams do not sample; "
                "leave one of them out or set do_sample to true"
            )
    return dataclasses.replace(params, **{**_SAMPLING, "temperature": 0.0})


def _check(params: SamplingParams) -> None:
    """Raise InvalidRequest for what contradicts itself."""
    width, n = params.beam_width, params.n
    rules = (
        (params.min_tokens > params.max_tokens, "min_tokens", f"at most max_tokens = {params.max_tokens}"),
        (params.do_sample is True and params.is_greedy, "do_sample", "false, or a temperature above 0"),
        (params.best_of is not None and params.best_of < n, "best_of", f"at least n = {n}"),
        (params.best_of is not None and params.is_beam, "best_of", f"nothing, since beam_width = {width} is given"),
        (params.truncate_prompt_tokens == 0, "truncate_prompt_tokens", "-1, or a whole number ≥ 1"),
        (params.is_beam and n > width, "n", f"at most beam_width = {width}"),
        (
            params.is_beam and params.logprobs,
            "logprobs",
            f"0, since beam_width = {width}: beams tell of their own tokens only",
        ),
        (width % params.num_beam_groups != 0, "num_beam_groups", f"a divisor of beam_width = {width}"),
        (
            params.num_beam_groups > 1 and params.do_sample is True,
            "num_beam_groups",
            "1, since do_sample is true",
        ),
        (
            params.diversity_penalty != 0 and params.num_beam_groups == 1,
            "diversity_penalty",
            "0, unless num_beam_groups is above 1",
        ),
        (
            params.diversity_penalty == 0 and params.num_beam_groups > 1,
            "diversity_penalty",
            "a number above 0, since groups would all find the same",
        ),
    )  # fmt: skip
    for is_broken, name, expected in rules:
        if is_broken:
            raise InvalidRequest(f"{name} has value {shown(getattr(params, name))}; expected {expected}")


FIELDS: dict[str, Number | Flag | Text | Texts | TokenIds | Biases] = {
    "n": Number(int, 1, 128),
    "best_of": Number(int, 1, 128),
    "max_tokens": Number(int, 1, LARGE),
    "min_tokens": Number(int, 0, LARGE),
    "do_sample": Flag(),
    "temperature": Number(float, 0.0, 100.0),
    "top_k": Number(int, -1, LARGE),
    "top_p": Number(float, 0.0, 1.0),
    "min_p": Number(float, 0.0, 1.0),
    "typical_p": Number(float, 0.0, 1.0),
    "repetition_penalty": Number(float, 0.01, 100.0),
    "presence_penalty": Number(float, -2.0, 2.0),
    "frequency_penalty": Number(float, -2.0, 2.0),
    "no_repeat_ngram_size": Number(int, 0, LARGE),
    "logit_bias": Biases(),
    "allowed_token_ids": TokenIds(is_optional=True),
    "bad_words": Texts(max_texts=256),
    "seed": Number(int, -(2**63), 2**64 - 1),
    "stop": Texts(),
    "stop_token_ids": TokenIds(),
    "include_stop_str_in_output": Flag(),
    "ignore_eos": Flag(),
    "skip_special_tokens": Flag(),
    "logprobs": Number(int, 0, 64),
    "prompt_logprobs": Number(int, 0, 64),
    "return_prompt_tokens": Flag(),
    "truncate_prompt_tokens": Number(int, -1, LARGE),
    "decoder_input_ids": TokenIds(),
    "priority": Number(int, -1000, 1000),
    "timeout_ms": Number(int, 0, LARGE),
    "beam_width": Number(int, 0, 128),
    "length_penalty": Number(float, -10.0, 10.0),
    "early_stopping": Flag(also="never"),
    "num_beam_groups": Number(int, 1, 128),
    "diversity_penalty": Number(float, 0.0, 100.0),
    "adapter": Text(),
}
ALIASES = {
    "beam_search_diversity_rate": "diversity_penalty",
    "end_id": "stop_token_ids",
    "len_penalty": "length_penalty",
    "lora_name": "adapter",
    "min_length": "min_tokens",
    "num_beams": "beam_width",
    "num_return_sequences": "n",
    "stop_words": "stop",
}
"""Names of other servers' clients for the same thing."""
OTHER_PARAMETERS = ("use_beam_search", "guided_decoding_guide_type", *GRAMMAR_PARAMETERS)
"""Parameters that decide fields, though they are none."""

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "encoder_no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1.0),
    "logits_processors": (None, []),
    "penalty_alpha": (None, 0.0),
    "sequence_bias": (None, {}, []),
}
"""Known parameters that would change the answer if ignored, with the values that ask for nothing."""


def _refuse_unsupported(name: str, value: Any) -> None:
    if name in UNSUPPORTED and value not in UNSUPPORTED[name]:
        raise InvalidRequest(f"{name} has value {shown(value)}, but this engine does not support it; leave it out")
