"""The engine's answers in the shape of OpenAI's completions API: choices, logprobs, usage, chunks.

Pure bookkeeping; it knows neither HTTP nor Triton. Choices are numbered prompt-major: prompt p's sequence s of n is
choice p·n + s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from triton_backend.protocol import GenerateResponse, SequenceOutput, TokenLogprob

MIN_LOGPROB = -9999.0
"""JSON has no −∞; a token that could not be chosen gets this, as vLLM does."""


@dataclass
class Choice:
    """One growing answer. ``text_offset`` is where its next token begins in the text that the client sees."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[tuple[TokenLogprob, ...]] = field(default_factory=list)
    finish_reason: str | None = None
    text_offset: int = 0

    def add(self, output: SequenceOutput) -> None:
        self.text += output.text
        self.token_ids += output.token_ids
        self.logprobs += output.logprobs
        self.finish_reason = output.finish_reason or self.finish_reason

    def take(self) -> dict[str, Any]:
        """What has come since the last take, as OpenAI's choice object."""
        logprobs, self.text_offset = _logprobs_object(self.logprobs, self.text_offset)
        taken = {
            "index": self.index,
            "text": self.text,
            "logprobs": logprobs,
            "finish_reason": self.finish_reason,
            "token_ids": self.token_ids,
        }
        self.text, self.token_ids, self.logprobs = "", [], []
        return taken


class Usage:
    """Token counts of one request over all its prompts."""

    def __init__(self, num_prompts: int) -> None:
        self._prompt_tokens = [0] * num_prompts
        self._cached_tokens = [0] * num_prompts
        self._completion_tokens = 0

    def add(self, prompt: int, response: GenerateResponse) -> None:
        self._prompt_tokens[prompt] = response.num_input_tokens or self._prompt_tokens[prompt]
        self._cached_tokens[prompt] = int(response.metrics.get("cached_tokens", self._cached_tokens[prompt]))
        self._completion_tokens += sum(len(output.token_ids) for output in response.outputs)

    @property
    def total_tokens(self) -> int:
        return sum(self._prompt_tokens) + self._completion_tokens

    def to_json(self) -> dict[str, Any]:
        prompt_tokens = sum(self._prompt_tokens)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": self._completion_tokens,
            "total_tokens": self.total_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached_tokens)},
        }


def _logprobs_object(tokens: Sequence[tuple[TokenLogprob, ...]], text_offset: int) -> tuple[dict[str, Any] | None, int]:
    """OpenAI's four parallel lists, and the offset after them; the chosen token comes first in each tuple."""
    if not tokens:
        return None, text_offset
    offsets = []
    for alternatives in tokens:
        offsets.append(text_offset)
        text_offset += len(alternatives[0].decoded_token)
    document = {
        "tokens": [alternatives[0].decoded_token for alternatives in tokens],
        "token_logprobs": [_finite(alternatives[0].logprob) for alternatives in tokens],
        "top_logprobs": [_by_text(alternatives) for alternatives in tokens],
        "text_offset": offsets,
    }
    return document, text_offset


def _by_text(alternatives: Sequence[TokenLogprob]) -> dict[str, float]:
    # Different tokens may have the same text (halves of a character): the first wins, and the chosen one is first.
    return {token.decoded_token: _finite(token.logprob) for token in reversed(alternatives)}


def _finite(logprob: float) -> float:
    return max(logprob, MIN_LOGPROB)
