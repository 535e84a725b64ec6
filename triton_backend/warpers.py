"""Which of a row's tokens may be drawn, and drawing one: temperature, top-k, top-p, min-p and typical-p.

A vocabulary is never sorted. What is wanted lies nearly always in a row's ``Head``, its largest logits in falling
order, together with the mass of the whole row; else the head is made longer. A token is drawn by inverting the
cumulative distribution at one number of the sequence's own generator, over the head first and then over the rest in
the order of ids, so that the rest is looked at only when the number falls there. Every row is treated by itself, in
float64 on the host: what a request gets never depends on its batch-mates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from triton_backend.sampling_params import SamplingParams

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


def draw(row: torch.Tensor | None, head: Head, params: SamplingParams, uniform: float) -> int:
    """The token at ``uniform`` (0…1) of the distribution of ``row`` (V) after its warpers.

    ``row`` may be None where ``top_k`` keeps no more than the head holds.
    """
    if params.typical_p < 1.0:
        assert row is not None
        return _draw_typical(row, params, uniform)
    if params.top_k <= 0:
        assert row is not None
        return _draw_nucleus(row, head, params, uniform)
    if params.top_k > len(head.ids) and row is not None:
        head = Head.of(row, params.top_k)
    weights = _weights(head, params)[: params.top_k]
    return _pick(head.ids, _cut(weights, float(weights.sum()), params), uniform)


def _draw_nucleus(row: torch.Tensor, head: Head, params: SamplingParams, uniform: float) -> int:
    """Of the whole vocabulary, or of its top-p or min-p part."""
    total = row_mass(row, float(head.logits[0]), params.temperature)
    weights = _weights(head, params)
    kept = _cut(weights, total, params)
    is_covered = len(kept) < len(weights) or len(weights) == len(row)
    if is_covered:
        return _pick(head.ids, kept, uniform)
    if params.top_p < 1.0 or params.min_p > 0.0:
        return _draw_nucleus(row, Head.of(row, len(weights) * _WIDENING), params, uniform)
    mass = float(weights.sum())
    if uniform * total < mass:
        return _pick(head.ids, weights, uniform * total / mass)
    return _draw_rest(row, head, params.temperature, (uniform * total - mass) / (total - mass))


def _draw_rest(row: torch.Tensor, head: Head, temperature: float, uniform: float) -> int:
    """Of the tokens outside the head, in the order of their ids."""
    weights = torch.exp((row - float(head.logits[0])).double() / temperature)
    weights[torch.from_numpy(head.ids).to(row.device)] = 0.0
    cumulative = weights.cumsum(dim=0)
    place = torch.searchsorted(cumulative, min(uniform, 1.0) * cumulative[-1:], right=True)
    last = (cumulative < cumulative[-1]).sum()
    return int(torch.minimum(place[0], last))


def _draw_typical(row: torch.Tensor, params: SamplingParams, uniform: float) -> int:
    """Meister et al. 2022, "Locally Typical Sampling": the tokens whose surprise is closest to what is expected, up to
    ``typical_p`` of the mass of what top-k, top-p and min-p kept."""
    width = params.top_k if params.top_k > 0 else len(row)
    head = Head.of(row, width)
    weights = _weights(head, params)
    kept = _cut(weights, float(weights.sum()), params)
    probs = kept / kept.sum()
    surprise = -np.log(np.maximum(probs, 1e-300))
    order = np.argsort(np.abs(surprise - float((probs * surprise).sum())), kind="stable")
    num_kept = int((np.cumsum(probs[order]) < params.typical_p).sum()) + 1
    chosen = np.sort(order[:num_kept])
    return _pick(head.ids[chosen], probs[chosen], uniform)


def row_mass(row: torch.Tensor, largest: float, temperature: float) -> float:
    """Sum over ``row`` (V) of exp((logit − largest) / temperature)."""
    shifted = row - largest
    return float((shifted if temperature == 1.0 else shifted.div_(temperature)).exp_().sum())


def log_normalizer(row: torch.Tensor, largest: float) -> float:
    """Log of the sum of exp(logit): what log probabilities are relative to."""
    return largest + math.log(row_mass(row, largest, 1.0))


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


def _pick(ids: np.ndarray, weights: np.ndarray, uniform: float) -> int:
    cumulative = np.cumsum(weights)
    place = int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
    return int(ids[min(place, len(weights) - 1)])


def kept_by_warpers(row: torch.Tensor, params: SamplingParams, min_kept: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores / temperature of the tokens that may be drawn, in falling order, and their ids; for beams that sample.

    At least ``min_kept`` are kept, so that a beam can go on when the best of them ends it.
    """
    width = max(params.top_k, min_kept) if params.top_k > 0 else len(row)
    head = Head.of(row, width)
    weights = _weights(head, params)
    num_kept = len(_cut(weights, float(weights.sum()), params, min_kept))
    is_possible = np.isfinite(head.logits[:num_kept])
    return head.logits[:num_kept][is_possible] / params.temperature, head.ids[:num_kept][is_possible]
