"""Chooses the next token of every sequence of a step, and what may follow every beam.

Three ways, chosen by the request alone so that a request's tokens never depend on its batch-mates:

    narrow   greedy, or 0 < top_k ≤ K: the graph's K largest logits are enough
    wide     other distributions: those K and, of the full logits, their mass; rarely more
    changed  biases, penalties, bans, grammars: the full logits, changed in place

A model may force the first token (``forced_bos_token_id``: the target language) and the last one that ``max_tokens``
allows (``forced_eos_token_id``); these take none. Log probabilities are the model's own, before any change. Beams
follow Hugging Face: what changes logits changes a beam's log probabilities. Owned by the engine thread.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable
from collections.abc import Sequence as Items

import numpy as np
import torch

from triton_backend.beam_search import Candidate
from triton_backend.config import ModelConfig
from triton_backend.logits_processors import LogitsProcessors, needs_history
from triton_backend.model_runner import Outputs
from triton_backend.protocol import TokenLogprob
from triton_backend.sampling_params import SamplingParams
from triton_backend.sequence import SampledToken, Sequence
from triton_backend.token_history import TokenHistory
from triton_backend.tokenizer import Tokenizer
from triton_backend.warpers import Head, draw, kept_by_warpers, log_normalizer


class Sampler:
    def __init__(self, config: ModelConfig, tokenizer: Tokenizer) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._processors = LogitsProcessors(config, tokenizer)
        self._histories: weakref.WeakKeyDictionary[Sequence, TokenHistory] = weakref.WeakKeyDictionary()

    def needs_logits(self, sequence: Sequence) -> bool:
        """Whether the next token of ``sequence`` cannot be chosen from the graph's K largest logits alone."""
        params = sequence.params
        if params.is_beam:
            return True
        if self._forced_id(sequence) is not None:
            return False
        is_narrow = params.is_greedy or (0 < params.top_k <= self._config.num_top_logits and params.typical_p == 1.0)
        return not is_narrow or wants_logprobs(params) or self._processors.are_needed(sequence)

    def sample(self, sequences: Items[Sequence], outputs: Outputs) -> list[SampledToken]:
        """One token per sequence, in order; ``outputs`` rows are the sequences' cache rows."""
        heads = _heads(sequences, outputs)
        return [self._sample_one(sequence, head, outputs) for sequence, head in zip(sequences, heads, strict=True)]

    def beam_candidates(self, beams: Items[Sequence], num_candidates: int, outputs: Outputs) -> list[list[Candidate]]:
        """For every beam the best tokens that may follow, best first, with their log probabilities."""
        heads = _heads(beams, outputs)
        return [
            self._candidates(beam, head, num_candidates, outputs.logits[beam.row])
            for beam, head in zip(beams, heads, strict=True)
        ]

    def prompt_logprobs(
        self, params: SamplingParams, next_ids: Iterable[int], logits: torch.Tensor
    ) -> list[tuple[TokenLogprob, ...]]:
        """Of each of ``next_ids``, the token that follows at each position of ``logits`` (S, V), and the likeliest."""
        num_best = params.prompt_logprobs or 0
        return [self._logprobs(row, token_id, num_best) for row, token_id in zip(logits, next_ids, strict=False)]

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """``child`` is a copy of ``parent`` from now on."""
        if parent in self._histories:
            self._histories[child] = self._histories[parent].fork()

    def _sample_one(self, sequence: Sequence, head: Head, outputs: Outputs) -> SampledToken:
        params = sequence.params
        if (forced_id := self._forced_id(sequence)) is not None:
            return self._forced(sequence, forced_id)
        if not self.needs_logits(sequence):
            return SampledToken(self._choose(None, head, sequence))
        raw = row = outputs.logits[sequence.row]
        if self._processors.change(sequence):
            row = raw.clone() if wants_logprobs(params) else raw
            self._processors.apply(row, sequence, self._history(sequence))
            head = Head.of(row, 1 if params.is_greedy else self._config.num_top_logits)
        token_id = self._choose(row, head, sequence)
        if not wants_logprobs(params):
            return SampledToken(token_id)
        return SampledToken(token_id, self._logprobs(raw, token_id, params.logprobs or 0))

    def _choose(self, row: torch.Tensor | None, head: Head, sequence: Sequence) -> int:
        if sequence.params.is_greedy:
            return int(head.ids[0])
        return draw(row, head, sequence.params, sequence.rng)

    def _candidates(self, beam: Sequence, head: Head, num: int, raw: torch.Tensor) -> list[Candidate]:
        params = beam.params
        if (forced_id := self._forced_id(beam)) is not None:
            return [Candidate(forced_id, 0.0, 0.0, self._forced(beam, forced_id).logprobs, is_forced=True)]
        normalizer = log_normalizer(raw, int(raw.argmax()))  # the head lacks what the model must not say
        is_changed = self._processors.are_needed(beam)
        row = raw
        if is_changed or params.do_sample or num > len(head.ids):
            row = raw - normalizer
            self._processors.apply(row, beam, self._history(beam))
            head = Head.of(row, num)
            scores = head.logits
        else:
            scores = (head.logits - np.float32(normalizer))[:num]
        ids = head.ids[: len(scores)]
        keys = scores
        if params.do_sample:
            scores, ids, keys = self._drawn(beam, row, num)
        return [
            Candidate(i, score, key, self._logprobs(raw, i, 0, normalizer) if params.logprobs is not None else ())
            for i, score, key in zip(ids.tolist(), scores.tolist(), keys.tolist(), strict=True)
            if score > -math.inf
        ]

    def _drawn(self, beam: Sequence, row: torch.Tensor, num: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Candidates drawn without replacement: the largest of score + Gumbel noise (Kool et al. 2019)."""
        scores, ids = kept_by_warpers(row, beam.params, min_kept=len(self._config.eos_token_ids) + 1)
        noise = np.random.default_rng(beam.state.lead.rng.getrandbits(64)).gumbel(size=len(scores))
        best = np.argsort(-(scores + noise), kind="stable")[:num]
        return scores[best], ids[best], (scores + noise)[best]

    def _history(self, sequence: Sequence) -> TokenHistory | None:
        if not needs_history(sequence.params):
            return None
        if sequence not in self._histories:
            self._histories[sequence] = TokenHistory(sequence.prompt_ids)
        return self._histories[sequence]

    def _forced_id(self, sequence: Sequence) -> int | None:
        """The one token that may come next, if the model says so; Hugging Face's ForcedBOS and ForcedEOS processors."""
        params, config = sequence.params, self._config
        is_last = len(sequence.output_ids) + 1 == params.max_tokens
        if is_last and not params.ignore_eos and config.forced_eos_token_id is not None:
            return config.forced_eos_token_id
        return config.forced_bos_token_id if sequence.num_tokens == 1 else None

    def _forced(self, sequence: Sequence, token_id: int) -> SampledToken:
        """A token that nothing else could have been: its log probability is 0."""
        if not wants_logprobs(sequence.params):
            return SampledToken(token_id, is_forced=True)
        known = TokenLogprob(token_id, 0.0, 1, self._tokenizer.token_text(token_id))
        return SampledToken(token_id, (known,), is_forced=True)

    def _logprobs(
        self, raw: torch.Tensor, token_id: int, num_best: int, normalizer: float | None = None
    ) -> tuple[TokenLogprob, ...]:
        """Log probabilities of the model itself, the chosen token first; ``normalizer`` if it is known already."""
        chosen = float(raw[token_id])
        rank = int((raw > chosen).sum()) + 1
        pairs = [(token_id, chosen, rank)]
        if num_best or normalizer is None:
            best = Head.of(raw, max(1, num_best))
            normalizer = log_normalizer(raw, int(best.ids[0]))
            pairs += [
                (other, value, place)
                for place, (other, value) in enumerate(zip(best.ids.tolist(), best.logits.tolist(), strict=True), 1)
                if other != token_id and place <= num_best
            ]
        return tuple(
            TokenLogprob(i, value - normalizer, place, self._tokenizer.token_text(i)) for i, value, place in pairs
        )


def wants_logprobs(params: SamplingParams) -> bool:
    return params.logprobs is not None or (params.best_of or params.n) > params.n


def _heads(sequences: Items[Sequence], outputs: Outputs) -> list[Head]:
    """The graph's largest logits of the sequences' rows, brought to the host in one go."""
    if not sequences:
        return []
    rows = torch.tensor([sequence.row for sequence in sequences], device=outputs.top_ids.device)
    logits, ids = outputs.top_logits[rows].cpu().numpy(), outputs.top_ids[rows].cpu().numpy()
    return [Head(*pair) for pair in zip(logits, ids, strict=True)]
