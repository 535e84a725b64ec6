"""Which keys a layer sees, read off the mask that its model asked for.

Transformers builds masks from functions of (row, head, query position, key position). While a model is measured, ours
is called instead: it keeps the function, and what the function says about long sequences tells the pattern.

    causal             every key up to the query
    window of w keys   the query and the w − 1 keys before it
    chunks of c keys   keys from the last multiple of c on (Llama 4)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from exporters.errors import UnsupportedArchitecture

MaskFunction = Callable[..., torch.Tensor]

NUM_SAMPLES = 16


@dataclass(frozen=True)
class Pattern:
    """``window`` and ``chunk`` are in tokens; at most one is set, None for both is causal."""

    window: int | None = None
    chunk: int | None = None


class MaskRecorder:
    """The mask function of a measured model: hands out masks and remembers what they meant."""

    def __init__(self, num_positions: int) -> None:
        self._num_positions = num_positions
        self._given: list[tuple[torch.Tensor, MaskFunction]] = []

    def __call__(
        self, batch_size: int, q_length: int, kv_length: int, *args: Any, mask_function: MaskFunction, **kwargs: Any
    ) -> torch.Tensor:
        mask = torch.ones(batch_size, 1, q_length, kv_length, dtype=torch.bool).tril()
        self._given.append((mask, mask_function))
        return mask

    def pattern_of(self, mask: torch.Tensor | None, layer: str) -> Pattern:
        """The pattern of ``mask`` as it arrived at ``layer``; no mask stands for causal, as in PyTorch's attention."""
        if mask is None:
            return Pattern()
        for given, function in self._given:
            if mask is given or mask._base is given:
                with torch.device("cpu"):  # the model may have no numbers
                    return classify(function, self._num_positions, layer)
        raise UnsupportedArchitecture(
            f"{layer} builds or changes its attention mask itself; expected one of transformers' masks"
        )


def classify(function: MaskFunction, num_positions: int, layer: str) -> Pattern:
    """What ``function`` shows of sequences of up to ``num_positions`` tokens; raises UnsupportedArchitecture
    if that is none of the patterns.
    """
    positions = torch.arange(num_positions)
    sees_first = _evaluate(function, positions, torch.zeros_like(positions))
    hidden = (~sees_first).nonzero()
    size = int(hidden[0]) if len(hidden) else None
    candidates = [Pattern()] if size is None else [Pattern(window=size), Pattern(chunk=size)]
    samples = torch.linspace(0, num_positions - 1, NUM_SAMPLES).long().tolist()
    if size is not None:
        samples += [q for q in (size - 1, size, size + 1, 2 * size) if 0 <= q < num_positions]
    for pattern in candidates:
        if all(_shows(function, pattern, query, positions) for query in samples):
            return pattern
    raise UnsupportedArchitecture(
        f"{layer} has an attention mask that is neither causal nor a window nor in chunks, which is not exported yet"
    )


def _shows(function: MaskFunction, pattern: Pattern, query: int, positions: torch.Tensor) -> bool:
    first = 0
    if pattern.window is not None:
        first = query - pattern.window + 1
    elif pattern.chunk is not None:
        first = query // pattern.chunk * pattern.chunk
    expected = (positions <= query) & (positions >= first)
    return torch.equal(_evaluate(function, torch.full_like(positions, query), positions), expected)


def _evaluate(function: MaskFunction, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    zero = torch.zeros_like(keys)
    return torch.as_tensor(function(zero, zero, queries, keys)).expand(len(keys)).bool()
