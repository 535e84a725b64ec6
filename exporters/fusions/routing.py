"""What a path does to its features, measured: where each one comes from, by what it is scaled, how it is rotated.

The measurement guesses from a few inputs and then checks the guess on random features at random positions; a path that
is anything else has no routing and is left alone.

Rotary with angles cos, sin (P, R/2) for P positions turns the first R features of a head of size D in pairs (a, b):
``a' = a·cos − b·sin``, ``b' = b·cos + a·sin``; pair i is (i, i + R/2), or (2i, 2i + 1) if interleaved. A scaling factor
of the attention, as in YaRN, is part of cos and sin. (Su et al., RoFormer, https://arxiv.org/abs/2104.09864)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from exporters.fusions.paths import Path

NUM_SAMPLES = 48
TOLERANCE = 2e-5
"""Of features of size 1; float32 cosines computed by different libraries differ by about a hundredth of it."""


@dataclass(frozen=True)
class Angles:
    """cos and sin of rotary, each (P, R/2), for whatever P positions were asked."""

    cos: np.ndarray
    sin: np.ndarray
    is_interleaved: bool

    def rotate(self, heads: np.ndarray) -> np.ndarray:
        """heads (P, H, D) → the same, turned."""
        width = 2 * self.cos.shape[1]
        first, second = _pairs(width, self.is_interleaved)
        cos, sin = self.cos[:, None], self.sin[:, None]
        turned = heads.copy()
        turned[..., first] = heads[..., first] * cos - heads[..., second] * sin
        turned[..., second] = heads[..., second] * cos + heads[..., first] * sin
        return turned


@dataclass(frozen=True)
class Routing:
    """Feature j of the target is feature ``columns[j]`` of the source times ``gain``, then turned by ``angles``.

    ``angles`` holds the sampled positions only.
    """

    columns: np.ndarray
    gain: float
    angles: Angles | None

    @property
    def is_straight(self) -> bool:
        """Whether the features arrive in the order in which they left."""
        return np.array_equal(self.columns, np.arange(len(self.columns)))


class Probe:
    """Measures paths for sequences of up to ``num_positions`` tokens."""

    def __init__(self, num_positions: int) -> None:
        generator = np.random.default_rng(0)
        self._generator = generator
        self.num_positions = num_positions
        positions = generator.integers(0, num_positions, NUM_SAMPLES)
        positions[:3] = (0, min(1, num_positions - 1), num_positions - 1)
        self.positions: np.ndarray = positions

    def measure(self, path: Path, num_heads: int) -> Routing | None:
        """How ``path`` routes its features to ``num_heads`` heads; None if it does anything else to them."""
        columns, gains = _columns(path)
        if columns is None:
            return None
        features = self._generator.standard_normal((NUM_SAMPLES, path.source_width), np.float32)
        found = path.run(features, self.positions)
        arrived = features[:, columns]
        if _is_close(found, arrived * gains[0]):
            return Routing(columns, float(gains[0]), None)
        for width, is_interleaved in self._rotary_forms(path, columns, num_heads):
            angles = self.angles(path, columns, num_heads, width, is_interleaved, self.positions)
            turned = angles.rotate(arrived.reshape(NUM_SAMPLES, num_heads, -1)).reshape(found.shape)
            # The model may scale its queries before they are turned; the scale is taken out of cos and sin below.
            if _is_close(found, turned):
                return Routing(columns, 1.0, angles)
        return None

    def angles(
        self,
        path: Path,
        columns: np.ndarray,
        num_heads: int,
        width: int,
        is_interleaved: bool,
        positions: np.ndarray,
    ) -> Angles:
        """Angles at ``positions`` if rotary turns the first ``width`` features in that form, read off the first head:
        a head of (1, 0) in every pair comes out as (cos, sin).
        """
        head_size = path.width // num_heads
        first, second = _pairs(width, is_interleaved)
        feature = np.zeros(path.source_width, np.float32)
        feature[columns[:head_size][first]] = 1
        parts = []
        block = max(1, (1 << 22) // max(path.source_width, path.width))
        for start in range(0, len(positions), block):
            some = positions[start : start + block]
            head = path.run(np.broadcast_to(feature, (len(some), len(feature))), some)[:, :head_size]
            parts.append((head[:, first], head[:, second]))
        cos, sin = (np.concatenate(part) for part in zip(*parts, strict=True))
        return Angles(cos, sin, is_interleaved)

    def _rotary_forms(self, path: Path, columns: np.ndarray, num_heads: int) -> list[tuple[int, bool]]:
        """(width, is_interleaved) that are worth trying, from what one head does to each of its features."""
        head_size = path.width // num_heads
        one_hot = np.zeros((head_size, path.source_width), np.float32)
        one_hot[np.arange(head_size), columns[:head_size]] = 1
        position = min(1, self.num_positions - 1)
        head = path.run(one_hot, np.full(head_size, position))[:, :head_size]
        touched = np.flatnonzero(np.abs(head - np.eye(head_size)).max(axis=1) > 1e-9)
        width = 0 if len(touched) == 0 else 2 * (int(touched[-1]) // 2 + 1)
        forms = [(head_size, False), (head_size, True), (width, False), (width, True)]
        return [form for index, form in enumerate(forms) if form[0] >= 2 and form not in forms[:index]]


def _columns(path: Path) -> tuple[np.ndarray | None, np.ndarray]:
    """(columns, gains) at position 0, where rotary turns nothing; columns are None if no feature stays itself."""
    ones = np.ones(path.source_width)
    numbers = np.arange(path.source_width) + 1
    gains, scaled = path.run(np.stack((ones, numbers)), np.zeros(2, np.int64))
    if not np.all(np.abs(gains) > 1e-6):
        return None, gains
    columns = scaled / gains - 1
    rounded = np.round(columns).astype(np.int64)
    if np.abs(columns - rounded).max() > 0.1 or rounded.min() < 0 or rounded.max() >= path.source_width:
        return None, gains
    return rounded, gains


def _pairs(width: int, is_interleaved: bool) -> tuple[np.ndarray, np.ndarray]:
    """Features (first, second) of every pair."""
    if is_interleaved:
        return np.arange(0, width, 2), np.arange(1, width, 2)
    return np.arange(width // 2), np.arange(width // 2, width)


def _is_close(found: np.ndarray, expected: np.ndarray) -> bool:
    return bool(np.abs(found - expected).max() <= TOLERANCE)
