"""The engine's answers in the shape of OpenAI's completions API: choices, logprobs, usage, chunks.

Pure bookkeeping; it knows neither HTTP nor Triton. Choices are numbered prompt-major: prompt p's sequence s of n is
choice p·n + s.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from triton_backend.protocol import GenerateResponse, SequenceOutput, TokenLogprob

MIN_LOGPROB = -9999.0
"""JSON has no −∞; a token that could not be chosen gets this, as vLLM does."""


@dataclass(frozen=True)
class ShownToken:
    """One place in OpenAI's four lists. ``alternatives`` has the token itself first; None where nothing predicts it."""

    text: str
    offset: int
    alternatives: tuple[TokenLogprob, ...] | None


@dataclass
class Choice:
    """One growing answer. ``num_echoed_chars`` are those before the generated text; ``about_prompt`` is told once."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    tokens: list[ShownToken] = field(default_factory=list)
    finish_reason: str | None = None
    num_echoed_chars: int = 0
    about_prompt: dict[str, Any] = field(default_factory=dict)

    def echo(self, text: str, response: GenerateResponse, num_best: int) -> None:
        """Begin with the prompt, and with its tokens, each with the ``num_best`` most likely ones in its place.

        ``text`` is what the client sees of the prompt. A tokenizer may read it with changes (composed characters,
        spaces at the beginning), so no token begins behind its end.
        """
        self.text = text
        offset = 0
        logprobs = response.prompt_logprobs or [None] * len(response.prompt_tokens)
        for token, alternatives in zip(response.prompt_tokens, logprobs, strict=True):
            shown = alternatives and best(alternatives, num_best)
            self.tokens.append(ShownToken(token.decoded_token, min(offset, len(text)), shown))
            offset += len(token.text)
        self.num_echoed_chars = len(text)

    def add(self, output: SequenceOutput) -> None:
        self.text += output.text
        self.token_ids += output.token_ids
        for alternatives in output.logprobs:
            chosen = alternatives[0]
            offset = self.num_echoed_chars + (chosen.text_offset or 0)
            self.tokens.append(ShownToken(chosen.decoded_token, offset, alternatives))
        self.finish_reason = output.finish_reason or self.finish_reason

    def take(self, with_logprobs: bool) -> dict[str, Any]:
        """What has come since the last take, as OpenAI's choice object."""
        taken = {
            "index": self.index,
            "text": self.text,
            "logprobs": _logprobs_object(self.tokens) if with_logprobs and self.tokens else None,
            "finish_reason": self.finish_reason,
            "token_ids": self.token_ids,
            **self.about_prompt,
        }
        self.text, self.token_ids, self.tokens, self.about_prompt = "", [], [], {}
        return taken


class Usage:
    """Token counts of one request over all its prompts."""

    def __init__(self, num_prompts: int) -> None:
        self._prompt_tokens = [0] * num_prompts
        self._cached_tokens = [0] * num_prompts
        self._completion_tokens = [0] * num_prompts
        self.num_sequences = 0
        """Candidates per prompt, as the engine says with its last response: a model's defaults may ask for beams."""

    def add(self, prompt: int, response: GenerateResponse) -> None:
        self._prompt_tokens[prompt] = response.num_input_tokens or self._prompt_tokens[prompt]
        self.num_sequences = int(response.metrics.get("num_sequences", self.num_sequences))
        self._cached_tokens[prompt] = int(response.metrics.get("cached_tokens", self._cached_tokens[prompt]))
        self._completion_tokens[prompt] += sum(len(output.token_ids) for output in response.outputs)

    def of_prompt(self, prompt: int) -> tuple[int, int]:
        """(prompt tokens, completion tokens) of one prompt; the former are 0 until its first response."""
        return self._prompt_tokens[prompt], self._completion_tokens[prompt]

    def to_json(self) -> dict[str, Any]:
        prompt_tokens, completion_tokens = sum(self._prompt_tokens), sum(self._completion_tokens)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached_tokens)},
        }


def without_tokens(response: GenerateResponse) -> GenerateResponse:
    """What is left of a response whose request wanted the prompt only."""
    outputs = tuple(SequenceOutput(output.index, "", finish_reason="length") for output in response.outputs)
    return dataclasses.replace(response, outputs=outputs)


def best(alternatives: Sequence[TokenLogprob], num_best: int) -> tuple[TokenLogprob, ...]:
    """The token itself, and of the others those among the ``num_best`` most likely ones."""
    chosen, *others = alternatives
    return (chosen, *(token for token in others if token.rank <= num_best))


def prompt_logprobs_object(response: GenerateResponse, num_best: int) -> list[dict[str, Any] | None]:
    """vLLM's list: per token of the prompt {token_id: {logprob, rank, decoded_token}}, None for the first."""
    tokens = response.prompt_logprobs or ()
    return [None if alternatives is None else _by_id(best(alternatives, num_best)) for alternatives in tokens]


def _by_id(alternatives: Sequence[TokenLogprob]) -> dict[str, Any]:
    return {
        str(token.token_id): {
            "logprob": _finite(token.logprob),
            "rank": token.rank,
            "decoded_token": token.decoded_token,
        }
        for token in alternatives
    }


def _logprobs_object(tokens: Sequence[ShownToken]) -> dict[str, Any]:
    """OpenAI's four parallel lists."""
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.alternatives and _finite(token.alternatives[0].logprob) for token in tokens],
        "top_logprobs": [token.alternatives and _by_text(token.alternatives) for token in tokens],
        "text_offset": [token.offset for token in tokens],
    }


def _by_text(alternatives: Sequence[TokenLogprob]) -> dict[str, float]:
    # Different tokens may have the same text (halves of a character): the first wins, and the chosen one is first.
    return {token.decoded_token: _finite(token.logprob) for token in reversed(alternatives)}


def _finite(logprob: float) -> float:
    return max(logprob, MIN_LOGPROB)
