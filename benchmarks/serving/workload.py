"""What the clients ask: prompts of random tokens from a seed, the same for every engine in every process."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property

from benchmarks.checkpoint import random_prompts

SHORTEST, LONGEST = 64, 256
"""Prompt tokens."""
WARM_UP_TOKENS, WARM_UP_NEW = 8, 4


@dataclass(frozen=True)
class Workload:
    """``waves`` prompts for each of ``num_clients`` clients, every one answered by ``num_new`` greedy tokens.

    Every wave has the same prompt lengths, evenly spread from ``shortest`` to ``longest`` and shuffled: an engine that
    runs one batch after the other does the same work in each of them.
    """

    vocab_size: int
    num_clients: int
    waves: int
    num_new: int
    seed: int = 0
    shortest: int = SHORTEST
    longest: int = LONGEST

    @cached_property
    def prompts(self) -> list[list[int]]:
        lengths = [length for wave in range(self.waves) for length in self._lengths(wave)]
        ids = random_prompts(self.vocab_size, len(lengths), self.longest, self._seed)
        return [row[:length] for row, length in zip(ids, lengths, strict=True)]

    @property
    def warm_up(self) -> Workload:
        """Short prompts, for as many clients: memory is allocated, and what is made on first use is there."""
        return Workload(
            self.vocab_size, self.num_clients, 1, WARM_UP_NEW, self.seed + 1, WARM_UP_TOKENS, WARM_UP_TOKENS
        )

    @property
    def _seed(self) -> int:
        return 1_000_000 + 1_000 * self.seed + self.num_clients

    def _lengths(self, wave: int) -> list[int]:
        n, span = self.num_clients, self.longest - self.shortest
        lengths = [self.shortest + round(span * (2 * i + 1) / (2 * n)) for i in range(n)]
        random.Random(f"{self._seed}/{wave}").shuffle(lengths)
        return lengths
