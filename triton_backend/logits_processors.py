"""Changes to a sequence's logits before a token is chosen: biases, penalties and bans.

Each works in place on one row (V,) of float32 and touches only the tokens that it is about. The order is Hugging
Face's. ``repetition_penalty`` is CTRL's (Keskar et al. 2019) over prompt and output; presence and frequency penalties
are OpenAI's, over the output only. A sequence that needs none of them never touches its full logits.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import numpy as np
import torch

from triton_backend.config import ModelConfig
from triton_backend.sampling_params import SamplingParams
from triton_backend.sequence import Sequence
from triton_backend.token_history import TokenHistory
from triton_backend.tokenizer import Tokenizer

NOTHING = float("-inf")


class LogitsProcessors:
    """Everything that may change the logits of a request's sequences."""

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._banned_sequences = lru_cache(maxsize=256)(self._encode_bad_words)

    def apply(self, logits: torch.Tensor, sequence: Sequence, history: TokenHistory | None) -> None:
        """Change ``logits`` (V); ``history`` is there if ``needs_history``."""
        params = sequence.params
        biases = {i: bias for i, bias in params.logit_bias if i < self._config.vocab_size}
        if biases:
            logits[list(biases)] += torch.tensor(list(biases.values()), device=logits.device)
        if history is not None:
            history.update(sequence.output_ids)
            _penalise(logits, params, history)
            ban(logits, _repeated_ngrams(history.tokens, params.no_repeat_ngram_size))
            ban(logits, _bad_words(history.tokens, self._banned_sequences(params.bad_words)))
        ban(logits, self._inside(self.early_ends(sequence)))
        if params.allowed_token_ids is not None:
            allow_only(logits, self._inside(params.allowed_token_ids))
        if sequence.grammar is not None:
            sequence.grammar.mask(logits)
        if not bool(torch.isfinite(logits.max())):  # nothing is left: let the text end
            ends = self._inside((*params.stop_token_ids, *self._config.eos_token_ids)) or [0]
            logits[ends] = 0.0

    def are_needed(self, sequence: Sequence) -> bool:
        params = sequence.params
        return bool(
            needs_history(params)
            or params.logit_bias
            or params.allowed_token_ids is not None
            or sequence.grammar is not None
            or self.early_ends(sequence)
        )

    def early_ends(self, sequence: Sequence) -> tuple[int, ...]:
        """Tokens that would end the sequence before ``min_tokens``."""
        params = sequence.params
        if len(sequence.output_ids) >= params.min_tokens:
            return ()
        return params.stop_token_ids + (() if params.ignore_eos else self._config.eos_token_ids)

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


def allow_only(logits: torch.Tensor, token_ids: list[int]) -> None:
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


def _bad_words(tokens: np.ndarray, sequences: Iterable[tuple[int, ...]]) -> list[int]:
    """Last tokens of the forbidden ``sequences`` whose other tokens are there."""
    end = tuple(tokens[-256:].tolist())
    return [ids[-1] for ids in sequences if len(ids) == 1 or end[-(len(ids) - 1) :] == ids[:-1]]
