"""Which of a row's tokens may be drawn, and drawing one: temperature, top-k, top-p, min-p and typical-p.

A vocabulary is never sorted. What may be drawn lies nearly always in a row's ``Head``, its largest logits in falling
order. Where it does not, a token is drawn from the whole row until one is drawn that may be: whether it may is the
mass of the more likely ones, one pass over the row. Every row is treated by itself and draws from its sequence's own
generator, so what a request gets never depends on its batch-mates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

import numpy as np
import torch

from triton_backend.sampling_params import SamplingParams

_BLOCK = 1024
_MAX_DRAWS = 16
_WIDENING = 8


@dataclass(frozen=True)
class Head:
    """The largest logits of a row, in falling order, and their ids, both (C)."""

    logits: np.ndarray
    ids: np.ndarray

    @classmethod
    def of(cls, logits: torch.Tensor, width: int) -> Head:
        """Of ``logits`` (V)."""
        top = torch.topk(logits, min(width, len(logits)))
        return cls(top.values.cpu().numpy(), top.indices.cpu().numpy())


def draw(row: torch.Tensor | None, head: Head, params: SamplingParams, rng: Random) -> int:
    """A token of the distribution of ``row`` (V) after its warpers.

    ``row`` may be None where ``top_k`` keeps no more than the head holds.
    """
    if params.typical_p < 1.0:
        assert row is not None
        return _draw_typical(row, params, rng)
    if params.top_k <= 0:
        assert row is not None
        return _draw_nucleus(row, head, params, rng)
    if params.top_k > len(head.ids) and row is not None:
        head = Head.of(row, params.top_k)
    weights = _weights(head, params)[: params.top_k]
    return int(head.ids[_pick(_cut(weights, float(weights.sum()), params), rng)])


def _draw_nucleus(row: torch.Tensor, head: Head, params: SamplingParams, rng: Random) -> int:
    """Of the whole vocabulary, or of its top-p and min-p part."""
    probs = _probs(row, params.temperature)
    largest = float(probs[int(head.ids[0])])
    kept = _cut(_weights(head, params), 1.0 / largest, params)
    if len(kept) < len(head.ids):
        return int(head.ids[_pick(kept, rng)])
    for _ in range(_MAX_DRAWS):
        token_id = _draw_one(probs, rng)
        if _is_kept(probs, token_id, largest, params):
            return token_id
    return _draw_wide(row, 1.0 / largest, params, rng)


def _draw_wide(row: torch.Tensor, total: float, params: SamplingParams, rng: Random) -> int:
    """Of a head that is made longer until it holds all that may be drawn."""
    width = _WIDENING
    while True:
        width = min(width * _WIDENING, len(row))
        head = Head.of(row, width)
        kept = _cut(_weights(head, params), total, params)
        if len(kept) < width or width == len(row):
            return int(head.ids[_pick(kept, rng)])


def _draw_one(probs: torch.Tensor, rng: Random) -> int:
    """An index of ``probs`` (V) by inverting the cumulative distribution, first of blocks, then within one."""
    num_whole = len(probs) // _BLOCK * _BLOCK
    masses = probs[:num_whole].view(-1, _BLOCK).sum(dim=1).cpu().numpy()
    rest = float(probs[num_whole:].sum())
    block = _pick(np.append(masses, rest).astype(np.float64), rng)
    inside = probs[block * _BLOCK : (block + 1) * _BLOCK].cpu().numpy()
    return block * _BLOCK + _pick(inside.astype(np.float64), rng)


def _is_kept(probs: torch.Tensor, token_id: int, largest: float, params: SamplingParams) -> bool:
    """Whether top-p and min-p keep a token: by the mass of all that are more likely."""
    prob = float(probs[token_id])
    if prob < params.min_p * largest:
        return False
    if params.top_p >= 1.0 or prob == largest:
        return True
    # Σ max(p, prob) counts every token that is not more likely as prob: cheaper than picking the others out.
    num_above = int((probs > prob).sum())
    above = float(probs.clamp(min=prob).sum()) - prob * (len(probs) - num_above)
    return above < params.top_p


def _draw_typical(row: torch.Tensor, params: SamplingParams, rng: Random) -> int:
    """Meister et al. 2022, "Locally Typical Sampling": the tokens whose surprise is closest to what is expected, up to
    ``typical_p`` of the mass of what top-k, top-p and min-p kept."""
    width = params.top_k if params.top_k > 0 else len(row)
    head = Head.of(row, width)
    weights = _weights(head, params)
    kept = _cut(weights, float(weights.sum()), params)
    chosen = _typical(kept, params)
    return int(head.ids[chosen][_pick(kept[chosen], rng)])


def _typical(weights: np.ndarray, params: SamplingParams, min_kept: int = 1) -> np.ndarray:
    """Places in ``weights`` of the tokens that typical-p keeps, in order."""
    probs = weights / weights.sum()
    surprise = -np.log(np.maximum(probs, 1e-300))
    order = np.argsort(np.abs(surprise - float((probs * surprise).sum())), kind="stable")
    num_kept = int((np.cumsum(probs[order]) < params.typical_p).sum()) + 1
    return np.sort(order[: max(num_kept, min_kept)])


def log_normalizer(row: torch.Tensor, largest_id: int) -> float:
    """Log of the sum of exp(logit) over ``row`` (V): what log probabilities are relative to."""
    return float(row[largest_id]) - math.log(float(_probs(row, 1.0)[largest_id]))


def _probs(row: torch.Tensor, temperature: float) -> torch.Tensor:
    # One pass of softmax takes half as long as the exponentials alone.
    return torch.softmax(row if temperature == 1.0 else row / temperature, dim=0)


def _weights(head: Head, params: SamplingParams) -> np.ndarray:
    """exp((logit − largest) / temperature), so the first is 1."""
    logits = head.logits.astype(np.float64)
    weights: np.ndarray = np.exp((logits - logits[0]) / params.temperature)
    return weights


def _cut(weights: np.ndarray, total: float, params: SamplingParams, min_kept: int = 1) -> np.ndarray:
    """The beginning of ``weights``, in falling order, that top-p and min-p keep of a whole of mass ``total``."""
    before = np.cumsum(weights) - weights
    is_kept = (before < params.top_p * total) & (weights >= params.min_p) & (weights > 0.0)
    is_kept[:min_kept] = True
    return weights[: len(is_kept) if is_kept.all() else int(is_kept.argmin())]


def _pick(weights: np.ndarray, rng: Random) -> int:
    """An index by the inverse of the cumulative distribution; never one of weight 0."""
    cumulative = np.cumsum(weights)
    place = int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))
    return min(place, int(np.searchsorted(cumulative, cumulative[-1])))


def kept_by_warpers(row: torch.Tensor, params: SamplingParams, min_kept: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores / temperature of the tokens that may be drawn, in falling order, and their ids; for beams that sample.

    At least ``min_kept`` are kept, so that a beam can go on when the best of them ends it.
    """
    width = max(params.top_k, min_kept) if params.top_k > 0 else len(row)
    head = Head.of(row, width)
    weights = _weights(head, params)
    weights = _cut(weights, float(weights.sum()), params, min_kept)
    kept = _typical(weights, params, min_kept) if params.typical_p < 1.0 else np.arange(len(weights))
    kept = kept[np.isfinite(head.logits[kept])]
    return head.logits[kept] / params.temperature, head.ids[kept]
