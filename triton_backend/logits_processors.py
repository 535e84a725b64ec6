"""Changes to a sequence's logits before a token is chosen: biases, penalties and bans.

Each works in place on one row (V,) of float32 and touches only the tokens that it is about. The order is Hugging
Face's. ``repetition_penalty`` is CTRL's (Keskar et al. 2019) over prompt and output; presence and frequency penalties
are OpenAI's, over the output only. A sequence that needs none of them never touches its full logits.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from triton_backend.config import ModelConfig
from triton_backend.sampling_params import SamplingParams
from triton_backend.sequence import RequestState, Sequence
from triton_backend.token_history import TokenHistory
from triton_backend.tokenizer import Tokenizer

NOTHING = float("-inf")


@dataclass(frozen=True)
class TokenTensors:
    """The token ids of a request's parameters, as tensors on the logits' device: made once, for lists may be long."""

    biased: torch.Tensor
    biases: torch.Tensor
    allowed: torch.Tensor | None
    ends: torch.Tensor


class LogitsProcessors:
    """Everything that may change the logits of a request's sequences. Used by the engine thread only."""

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._banned_sequences = lru_cache(maxsize=256)(self._encode_bad_words)
        self._suppressed = list(config.suppressed_token_ids)
        self._tensors: weakref.WeakKeyDictionary[RequestState, TokenTensors] = weakref.WeakKeyDictionary()

    def apply(self, logits: torch.Tensor, sequence: Sequence, history: TokenHistory | None) -> None:
        """Change ``logits`` (V); ``history`` is there if ``needs_history``."""
        params, tensors = sequence.params, self._tensors_of(sequence, logits.device)
        if len(tensors.biased):
            logits[tensors.biased] += tensors.biases
        if history is not None:
            history.update(sequence.output_ids)
            _penalise(logits, params, history)
            ban(logits, _repeated_ngrams(history.tokens, params.no_repeat_ngram_size))
            ban(logits, _bad_words(history.tokens, self._banned_sequences(params.bad_words)))
        ban(logits, self._suppressed)
        if self._is_too_early_to_end(sequence):
            logits[tensors.ends] = NOTHING
        if tensors.allowed is not None:
            allow_only(logits, tensors.allowed)
        if sequence.grammar is not None:
            sequence.grammar.mask(logits)
        if not bool(torch.isfinite(logits.max())):  # nothing is left: let the text end
            ends = self._inside((*params.stop_token_ids, *self._config.eos_token_ids)) or [0]
            logits[ends] = 0.0

    def are_needed(self, sequence: Sequence) -> bool:
        """Whether the next token may be another one than the graph's largest logits say."""
        params = sequence.params
        return bool(
            needs_history(params)
            or params.logit_bias
            or params.allowed_token_ids is not None
            or sequence.grammar is not None
            or self._is_too_early_to_end(sequence)
        )

    def change(self, sequence: Sequence) -> bool:
        """Whether its logits are not what tokens are chosen by; the graph's largest ones know of suppressed tokens."""
        return bool(self._suppressed) or self.are_needed(sequence)

    def _is_too_early_to_end(self, sequence: Sequence) -> bool:
        """Whether there are tokens that would end the sequence before ``min_tokens``."""
        params = sequence.params
        has_ends = bool(params.stop_token_ids) or (not params.ignore_eos and bool(self._config.eos_token_ids))
        return has_ends and len(sequence.output_ids) < params.min_tokens

    def _tensors_of(self, sequence: Sequence, device: torch.device) -> TokenTensors:
        if (known := self._tensors.get(sequence.state)) is not None:
            return known
        params = sequence.params
        biases = dict(params.logit_bias)
        ends = params.stop_token_ids + (() if params.ignore_eos else self._config.eos_token_ids)

        def ids(token_ids: Iterable[int]) -> torch.Tensor:
            return torch.tensor(self._inside(token_ids), dtype=torch.long, device=device)

        made = self._tensors[sequence.state] = TokenTensors(
            biased=ids(biases),
            biases=torch.tensor(list(biases.values()), device=device),
            allowed=None if params.allowed_token_ids is None else ids(params.allowed_token_ids),
            ends=ids(ends),
        )
        return made

    def _inside(self, token_ids: Iterable[int]) -> list[int]:
        """Ids outside the vocabulary are harmless: they never match."""
        return [token_id for token_id in token_ids if token_id < self._config.vocab_size]

    def _encode_bad_words(self, words: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
        """Each word as it is tokenized at the beginning of a text and after a space; end tokens cannot be bad words."""
        found = {self._tokenizer.encode_plain(prefix + word) for word in words for prefix in ("", " ")}
        ends = {(token_id,) for token_id in self._config.eos_token_ids}
        return tuple(sorted(ids for ids in found - ends if ids))


def needs_history(params: SamplingParams) -> bool:
    return (
        params.repetition_penalty != 1.0
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
        or params.no_repeat_ngram_size > 0
        or bool(params.bad_words)
    )


def ban(logits: torch.Tensor, token_ids: list[int]) -> None:
    """Make tokens impossible."""
    if token_ids:
        logits[token_ids] = NOTHING


def allow_only(logits: torch.Tensor, token_ids: torch.Tensor) -> None:
    kept = logits[token_ids]
    logits.fill_(NOTHING)
    logits[token_ids] = kept


def _penalise(logits: torch.Tensor, params: SamplingParams, history: TokenHistory) -> None:
    if params.repetition_penalty != 1.0:
        seen = torch.from_numpy(history.unique_ids).to(logits.device)
        values, penalty = logits[seen], params.repetition_penalty
        logits[seen] = torch.where(values < 0, values * penalty, values / penalty)
    if params.presence_penalty or params.frequency_penalty:
        is_generated = history.output_counts > 0
        ids = torch.from_numpy(history.unique_ids[is_generated]).to(logits.device)
        counts = history.output_counts[is_generated]
        penalties = params.frequency_penalty * counts + params.presence_penalty
        logits[ids] -= torch.from_numpy(penalties.astype(np.float32)).to(logits.device)


def _repeated_ngrams(tokens: np.ndarray, size: int) -> list[int]:
    """Tokens that would complete an n-gram of ``size`` which occurred before."""
    num_starts = len(tokens) - size + 1
    if size == 0 or num_starts <= 0:
        return []
    is_match = np.ones(num_starts, dtype=bool)
    end = tokens[len(tokens) - size + 1 :]
    for offset in range(size - 1):
        is_match &= tokens[offset : offset + num_starts] == end[offset]
    return np.unique(tokens[size - 1 :][is_match]).tolist()


def _bad_words(tokens: np.ndarray, sequences: Collection[tuple[int, ...]]) -> list[int]:
    """Last tokens of the forbidden ``sequences`` whose other tokens are there."""
    longest = max(map(len, sequences), default=0)
    end = tuple(tokens[max(0, len(tokens) - longest) :].tolist())
    return [ids[-1] for ids in sequences if len(ids) == 1 or end[-(len(ids) - 1) :] == ids[:-1]]
