"""Learning rate over a run: linear warm-up, cosine decay to zero, and a time limit that shortens the decay.

A run counts steps, so that it is the same whenever it is repeated. On a machine too slow for that, time takes over and
the cosine still completes. Imports only the standard library.

    learning rate   ╭─╮                  time takes over where it is ahead of the steps; its clock starts
                   ╱   ╲                 after a third of the limit and runs 1.5 times as fast, so it never
                  ╱      ╲__             catches a run that keeps a pace to finish in time
                  warm-up  decay
"""

from __future__ import annotations

import math
from dataclasses import dataclass

GRACE_FRACTION = 1 / 3


@dataclass(frozen=True)
class Schedule:
    learning_rate: float
    warmup_steps: int
    max_steps: int
    time_limit_s: float

    def fraction(self, step: int, elapsed_s: float) -> float:
        """Part of the run that is over, between 0 and 1; 1 means stop."""
        return min(1.0, max(step / self.max_steps, self._time_fraction(elapsed_s)))

    def learning_rate_at(self, step: int, elapsed_s: float) -> float:
        warmup = min(1.0, (step + 1) / max(1, self.warmup_steps))
        return self.learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * self.fraction(step, elapsed_s)))

    def _time_fraction(self, elapsed_s: float) -> float:
        if self.time_limit_s <= 0:
            return 1.0
        return (elapsed_s / self.time_limit_s - GRACE_FRACTION) / (1 - GRACE_FRACTION)
