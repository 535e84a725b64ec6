"""Chooses the next token of every sequence of a step, vectorised over sequences that take the same path.

Three paths, chosen by the request alone so that a request's tokens never depend on its batch-mates:

    greedy       top_ids[:, 0] of the graph
    candidates   0 < top_k ≤ K: temperature, top-k, top-p and min-p over the graph's K largest logits
    full         anything else: penalties, banned ends, log probabilities, or a distribution wider than K

A model may force the first token (``forced_bos_token_id``: the target language) and the last one that ``max_tokens``
allows (``forced_eos_token_id``); these take no path.

The order is Hugging Face's: processors, temperature, top-k, top-p, min-p. A vocabulary is never sorted: what top-k
and top-p need comes from ``topk`` with a width that grows until it covers the nucleus. A token is drawn by inverting
the cumulative distribution at one number from the sequence's own generator. Owned by the engine thread.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch

from triton_backend.config import ModelConfig
from triton_backend.logits_processors import TokenCounts, ban_tokens, needs_penalties
from triton_backend.model_runner import Outputs
from triton_backend.protocol import TokenLogprob
from triton_backend.sequence import SampledToken, Sequence
from triton_backend.tokenizer import Tokenizer

_WIDENING = 8


class Sampler:
    def __init__(self, config: ModelConfig, tokenizer: Tokenizer) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._counts: weakref.WeakKeyDictionary[Sequence, TokenCounts] = weakref.WeakKeyDictionary()

    def needs_logits(self, sequence: Sequence) -> bool:
        """Whether the next token of ``sequence`` cannot be chosen from the graph's K largest logits."""
        params = sequence.params
        if self._forced_id(sequence) is not None:
            return False
        is_narrow = params.is_greedy or 0 < params.top_k <= self._config.num_top_logits
        return (
            not is_narrow or needs_penalties(params) or params.logprobs is not None or bool(self._banned_ids(sequence))
        )

    def sample(self, sequences: Iterable[Sequence], outputs: Outputs) -> list[SampledToken]:
        """One token per sequence, in order; ``outputs`` rows are the sequences' cache rows."""
        sequences = list(sequences)
        tokens = {s: self._forced(s, token_id) for s in sequences if (token_id := self._forced_id(s)) is not None}
        full = [s for s in sequences if self.needs_logits(s)]
        narrow = [s for s in sequences if s not in tokens and s not in set(full)]
        tokens.update(self._sample_narrow(narrow, outputs))
        tokens.update(self._sample_full(full, outputs))
        return [tokens[sequence] for sequence in sequences]

    def _forced_id(self, sequence: Sequence) -> int | None:
        """The one token that may come next, if the model says so; Hugging Face's ForcedBOS and ForcedEOS processors."""
        params, num_output = sequence.params, len(sequence.output_ids)
        if (
            num_output + 1 == params.max_tokens
            and not params.ignore_eos
            and self._config.forced_eos_token_id is not None
        ):
            return self._config.forced_eos_token_id
        return self._config.forced_bos_token_id if num_output == 0 else None

    def _forced(self, sequence: Sequence, token_id: int) -> SampledToken:
        """A token that nothing else could have been: its log probability is 0."""
        if sequence.params.logprobs is None:
            return SampledToken(token_id)
        return SampledToken(token_id, (TokenLogprob(token_id, 0.0, 1, self._tokenizer.token_text(token_id)),))

    def _sample_narrow(self, sequences: list[Sequence], outputs: Outputs) -> dict[Sequence, SampledToken]:
        top_ids = outputs.top_ids.numpy()
        tokens = {s: SampledToken(int(top_ids[s.row, 0])) for s in sequences if s.params.is_greedy}
        sampled = [s for s in sequences if not s.params.is_greedy]
        if sampled:
            rows = torch.tensor([s.row for s in sampled])
            chosen = draw(candidate_probs(outputs.top_logits[rows], sampled), sampled)
            ids = outputs.top_ids[rows].gather(1, chosen[:, None])[:, 0].tolist()
            tokens.update(zip(sampled, map(SampledToken, ids), strict=True))
        return tokens

    def _sample_full(self, sequences: list[Sequence], outputs: Outputs) -> dict[Sequence, SampledToken]:
        if not sequences:
            return {}
        raw = outputs.logits[torch.tensor([s.row for s in sequences])]  # (B, V), a copy
        logits = raw.clone() if any(s.params.logprobs is not None for s in sequences) else raw
        for row, sequence in zip(logits, sequences, strict=True):
            self._process(row, sequence)
        ids = choose(logits, sequences)
        return {
            sequence: SampledToken(token_id, self._logprobs(raw_row, token_id, sequence))
            for sequence, token_id, raw_row in zip(sequences, ids, raw, strict=True)
        }

    def _process(self, logits: torch.Tensor, sequence: Sequence) -> None:
        if needs_penalties(sequence.params):
            if sequence not in self._counts:
                self._counts[sequence] = TokenCounts(sequence, self._config.vocab_size)
            counts = self._counts[sequence]
            counts.update(sequence.output_ids)
            counts.apply(logits, sequence.params)
        ban_tokens(logits, self._banned_ids(sequence))

    def _banned_ids(self, sequence: Sequence) -> tuple[int, ...]:
        """Tokens that would end the sequence before ``min_tokens``."""
        params = sequence.params
        if len(sequence.output_ids) >= params.min_tokens:
            return ()
        return params.stop_token_ids + (() if params.ignore_eos else self._config.eos_token_ids)

    def _logprobs(self, raw: torch.Tensor, token_id: int, sequence: Sequence) -> tuple[TokenLogprob, ...]:
        """Log probabilities of the model itself, before penalties and temperature, the chosen token first."""
        if sequence.params.logprobs is None:
            return ()
        normalizer = float(torch.logsumexp(raw, dim=0))
        rank = int((raw > raw[token_id]).sum()) + 1
        best = torch.topk(raw, min(sequence.params.logprobs, raw.shape[0]))
        pairs = [(token_id, float(raw[token_id]), rank)]
        pairs += [
            (other, value, place)
            for place, (other, value) in enumerate(zip(best.indices.tolist(), best.values.tolist(), strict=True), 1)
            if other != token_id
        ]
        return tuple(
            TokenLogprob(i, value - normalizer, place, self._tokenizer.token_text(i)) for i, value, place in pairs
        )


def choose(logits: torch.Tensor, sequences: list[Sequence]) -> list[int]:
    """Token ids for processed full logits (B, V)."""
    ids = torch.from_numpy(logits.numpy().argmax(axis=1))  # NumPy's argmax is 10 times faster than torch's on CPU
    for wanted, choose_rows in ((is_plain, _choose_plain), (is_nucleus, _choose_nucleus)):
        rows = [i for i, s in enumerate(sequences) if not s.params.is_greedy and wanted(s)]
        if rows:
            ids[rows] = choose_rows(logits[rows], [sequences[i] for i in rows])
    return ids.tolist()


def is_plain(sequence: Sequence) -> bool:
    """Sampling from the whole vocabulary: neither top-k nor top-p cuts it."""
    return sequence.params.top_k <= 0 and sequence.params.top_p >= 1.0


def is_nucleus(sequence: Sequence) -> bool:
    return not is_plain(sequence)


def _choose_plain(logits: torch.Tensor, sequences: list[Sequence]) -> torch.Tensor:
    scaled = logits / _column(sequences, "temperature")
    min_p = _column(sequences, "min_p")
    floor = scaled.max(dim=1, keepdim=True).values + torch.log(min_p)  # log 0 = −inf keeps everything
    return draw(torch.softmax(scaled.masked_fill(scaled < floor, float("-inf")), dim=1), sequences)


def _choose_nucleus(logits: torch.Tensor, sequences: list[Sequence]) -> torch.Tensor:
    """Row by row: how wide the candidates must be depends on each row's own distribution."""
    return torch.cat([_choose_nucleus_row(row[None, :], [s]) for row, s in zip(logits, sequences, strict=True)])


def _choose_nucleus_row(logits: torch.Tensor, sequence: list[Sequence]) -> torch.Tensor:
    params, vocab_size = sequence[0].params, logits.shape[1]
    if params.top_k > 0:
        width = min(params.top_k, vocab_size)
    else:
        scaled = logits / params.temperature
        normalizer = torch.logsumexp(scaled, dim=1)
        width = min(64, vocab_size)
        while width < vocab_size:
            mass = torch.exp(torch.topk(scaled, width).values - normalizer).sum()
            if mass >= params.top_p:
                break
            width = min(width * _WIDENING, vocab_size)
    top = torch.topk(logits, width, dim=1)
    whole = torch.logsumexp(logits / params.temperature, dim=1, keepdim=True) if params.top_k <= 0 else None
    return top.indices.gather(1, draw(candidate_probs(top.values, sequence, whole), sequence)[:, None])[:, 0]


def candidate_probs(
    logits: torch.Tensor, sequences: list[Sequence], normalizer: torch.Tensor | None = None
) -> torch.Tensor:
    """Probabilities (B, C) of candidates with ``logits`` (B, C) in falling order, after temperature, top-k, top-p and
    min-p.

    ``normalizer`` (B, 1) is the log of the whole vocabulary's scaled mass, where the candidates are only its head;
    without it they are everything that top-k keeps. A cut candidate has probability 0; the rest sum to 1.
    """
    scaled = logits / _column(sequences, "temperature")
    top_k = torch.tensor([[s.params.top_k if s.params.top_k > 0 else logits.shape[1]] for s in sequences])
    scaled = scaled.masked_fill(torch.arange(logits.shape[1]) >= top_k, float("-inf"))
    probs = torch.softmax(scaled, dim=1) if normalizer is None else torch.exp(scaled - normalizer)
    before = probs.cumsum(dim=1) - probs  # mass of the more likely candidates
    cut = (before >= _column(sequences, "top_p")) | (probs < probs[:, :1] * _column(sequences, "min_p"))
    cut[:, 0] = False
    probs = probs.masked_fill(cut, 0.0)
    return probs / probs.sum(dim=1, keepdim=True)


def draw(probs: torch.Tensor, sequences: list[Sequence]) -> torch.Tensor:
    """One index per row of ``probs`` (B, C), by inverse transform with each sequence's next random number."""
    cumulative = probs.cumsum(dim=1)
    uniform = torch.tensor([[s.rng.random()] for s in sequences], dtype=cumulative.dtype)
    chosen = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)[:, 0]
    # Rounding may point past the last candidate that has mass; the largest index with mass is the right one then.
    last = (cumulative < cumulative[:, -1:]).sum(dim=1)
    return torch.minimum(chosen, last)


def _column(sequences: list[Sequence], name: str) -> torch.Tensor:
    return torch.tensor([[float(getattr(s.params, name))] for s in sequences])
