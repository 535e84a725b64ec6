"""Changes to a sequence's logits before a token is chosen: penalties and the ban of end tokens.

Each works in place on one row (V,) of float32 logits. Formulas: ``repetition_penalty`` is CTRL's (Keskar et al. 2019)
over prompt and output, as in Hugging Face; presence and frequency penalties are OpenAI's, over the output only. A
sequence that needs none of them never touches its full logits.
"""

from __future__ import annotations

import torch

from triton_backend.sampling_params import SamplingParams
from triton_backend.sequence import Sequence


def needs_penalties(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0


class TokenCounts:
    """How often each token occurred in one sequence, kept as (V,) tensors so that a step costs O(V), not O(length)."""

    def __init__(self, sequence: Sequence, vocab_size: int) -> None:
        self._seen = torch.zeros(vocab_size, dtype=torch.bool)
        self._seen[torch.tensor(sequence.prompt_ids, dtype=torch.long)] = True
        self._output_counts = torch.zeros(vocab_size, dtype=torch.float32)
        self._num_counted = 0

    def update(self, output_ids: list[int]) -> None:
        for token_id in output_ids[self._num_counted :]:
            self._seen[token_id] = True
            self._output_counts[token_id] += 1
        self._num_counted = len(output_ids)

    def apply(self, logits: torch.Tensor, params: SamplingParams) -> None:
        if params.repetition_penalty != 1.0:
            penalty = params.repetition_penalty
            penalised = torch.where(logits < 0, logits * penalty, logits / penalty)
            torch.where(self._seen, penalised, logits, out=logits)
        logits -= params.frequency_penalty * self._output_counts
        logits -= params.presence_penalty * (self._output_counts > 0)


def ban_tokens(logits: torch.Tensor, token_ids: tuple[int, ...]) -> None:
    """Make tokens impossible; ids outside the vocabulary are ignored."""
    inside = [token_id for token_id in token_ids if token_id < logits.shape[-1]]
    logits[inside] = float("-inf")
