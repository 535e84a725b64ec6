"""The tokens of one sequence, kept so that penalties cost what was said, not what could be said.

Arrays grow by doubling; a step adds one token. Owned by the sampler, one per sequence that needs it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np


class TokenHistory:
    """``tokens`` (L) in order; ``unique_ids`` (U) and, for each, ``output_counts`` (U): how often it was generated."""

    def __init__(self, prompt_ids: Sequence[int]) -> None:
        self._tokens = np.array(prompt_ids, dtype=np.int64)
        self._num_tokens = len(self._tokens)
        self._unique_ids = np.unique(self._tokens)
        self._num_unique = len(self._unique_ids)
        self._output_counts = np.zeros(self._num_unique, dtype=np.float32)
        self._places = {token_id: place for place, token_id in enumerate(self._unique_ids.tolist())}
        self._num_output = 0

    @property
    def tokens(self) -> np.ndarray:
        return self._tokens[: self._num_tokens]

    @property
    def unique_ids(self) -> np.ndarray:
        return self._unique_ids[: self._num_unique]

    @property
    def output_counts(self) -> np.ndarray:
        return self._output_counts[: self._num_unique]

    def update(self, output_ids: Sequence[int]) -> None:
        """Take in what was generated since the last call."""
        for token_id in output_ids[self._num_output :]:
            self._tokens = _with_room(self._tokens, self._num_tokens)
            self._tokens[self._num_tokens] = token_id
            self._num_tokens += 1
            place = self._places.get(token_id)
            if place is None:
                place = self._places[token_id] = self._num_unique
                self._unique_ids = _with_room(self._unique_ids, place)
                self._output_counts = _with_room(self._output_counts, place)
                self._unique_ids[place] = token_id
                self._output_counts[place] = 0
                self._num_unique += 1
            self._output_counts[place] += 1
        self._num_output = len(output_ids)

    def fork(self) -> TokenHistory:
        other = copy.copy(self)
        other._tokens, other._unique_ids = self._tokens.copy(), self._unique_ids.copy()
        other._output_counts, other._places = self._output_counts.copy(), dict(self._places)
        return other


def _with_room(array: np.ndarray, size: int) -> np.ndarray:
    return array if size < len(array) else np.concatenate([array, np.zeros(max(64, size), dtype=array.dtype)])
