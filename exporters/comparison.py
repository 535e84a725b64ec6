"""Comparing two models' choices and distributions: the arithmetic of a certificate, without files and models.

Greedy tokens are compared with one forward pass of the original over prompt and tokens. If the original's own choice
after every prefix is the next token, then by induction these are the tokens that it would have generated; the first
position at which it is not is the first difference. What follows a difference is not the original's path any more, but
how often the two agree there still says something: the agreement.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

TOP = 5
"""Largest logits that a certificate keeps per prompt."""


@dataclass(frozen=True)
class PromptResult:
    """One prompt. ``result`` is ``equal``, ``tie`` or ``mismatch``; ``position`` is the first new token that differs.

    ``logit_gap`` is by how much the original preferred its own token to the exported version's there; ``num_agreeing``
    counts the positions, behind a difference too, at which the original would have chosen the version's token.
    ``prompt_ids``, ``token_ids`` and ``top`` (token ids and logits behind the prompt) are the version's, so that it can
    be run again.
    """

    name: str
    num_prompt_tokens: int
    num_new_tokens: int
    num_equal: int
    num_agreeing: int
    result: str
    position: int | None = None
    expected: int | None = None
    found: int | None = None
    logit_gap: float | None = None
    prompt_ids: tuple[int, ...] = ()
    token_ids: tuple[int, ...] = ()
    top: tuple[tuple[int, float], ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Judgement:
    """``position`` None: all tokens are the original's."""

    result: str
    num_equal: int
    num_agreeing: int
    position: int | None = None
    expected: int | None = None
    found: int | None = None
    logit_gap: float | None = None


def judge(
    logits: torch.Tensor,
    tokens: Sequence[int],
    num_expected: int,
    tie_logit_gap: float,
    suppressed: Sequence[int] = (),
) -> Judgement:
    """Compare ``tokens`` with the choices of the original, whose logits (S, V) at their positions are given.

    Fewer than ``num_expected`` tokens are a mismatch behind the last one. ``suppressed`` tokens are never chosen.
    """
    if not tokens:
        return Judgement("mismatch", 0, 0, position=0)
    choices = allowed(logits[: len(tokens)], suppressed).argmax(-1)
    agrees = choices == torch.tensor(list(tokens))
    num_agreeing = int(agrees.sum())
    if bool(agrees.all()):
        if len(tokens) < num_expected:
            return Judgement("mismatch", len(tokens), num_agreeing, position=len(tokens))
        return Judgement("equal", len(tokens), num_agreeing)
    position = int(agrees.int().argmin())
    expected, found = int(choices[position]), tokens[position]
    gap = float(logits[position, expected] - logits[position, found])
    result = "tie" if gap < tie_logit_gap else "mismatch"
    return Judgement(result, position, num_agreeing, position, expected, found, finite(gap))


def top_of(logits: np.ndarray, suppressed: Sequence[int] = ()) -> tuple[tuple[int, float], ...]:
    """The largest logits of (V,) but of ``suppressed`` tokens, largest first, with their token ids."""
    order = np.argsort(-logits, kind="stable")
    order = order[~np.isin(order, suppressed)][:TOP]
    return tuple((int(token), round(float(logits[token]), 6)) for token in order if np.isfinite(logits[token]))


class TextLogits:
    """What the exported version said about the windows of a text. All positions count for perplexity and choice; whole
    distributions, which are large, are kept for every ``stride``-th position only, until the original is compared.

    ``suppressed`` tokens are never chosen; they may occur in a text, and have their part of every distribution.
    """

    def __init__(self, stride: int, suppressed: Sequence[int] = ()) -> None:
        self.stride = stride
        self._suppressed = suppressed
        self.losses: list[np.ndarray] = []
        self.choices: list[np.ndarray] = []
        self.kept: list[np.ndarray] = []
        self._num_seen = 0

    def add(self, logits: torch.Tensor, targets: Sequence[int]) -> None:
        """Logits (S, V) of positions whose next tokens are ``targets`` (S)."""
        if not len(logits):
            return
        self.losses.append(_losses(logits, targets))
        self.choices.append(allowed(logits, self._suppressed).argmax(-1).numpy())
        self.kept += list(logits[-self._num_seen % self.stride :: self.stride].numpy().copy())
        self._num_seen += len(logits)


class TextComparison:
    """The original on the same text, compared position by position while it reads, so that it need not be kept."""

    def __init__(self, exported: TextLogits, suppressed: Sequence[int] = ()) -> None:
        self._exported = exported
        self._suppressed = suppressed
        self._losses: list[np.ndarray] = []
        self._choices: list[np.ndarray] = []
        self._divergences: list[float] = []
        self._differences: list[tuple[float, float]] = []
        self._max_logit = 0.0
        self._num_seen = 0

    def add(self, logits: torch.Tensor, targets: Sequence[int]) -> None:
        """As for the exported version; the windows must be the same, in the same order."""
        if not len(logits):
            return
        self._losses.append(_losses(logits, targets))
        self._choices.append(allowed(logits, self._suppressed).argmax(-1).numpy())
        self._max_logit = max(self._max_logit, _largest(logits.numpy()))
        stride = self._exported.stride
        for row in logits[-self._num_seen % stride :: stride].numpy():
            found = self._exported.kept[len(self._divergences)]
            self._differences.append(difference(row, found))
            self._divergences.append(_kl(row, found))
        self._num_seen += len(logits)

    def text(self) -> dict[str, Any]:
        """Perplexities and their ratio, agreement of choices, and KL(original ‖ exported) in nats.

        A figure that is no finite number is None, so that it is valid JSON and passes no check.
        """
        divergences = np.array(self._divergences)
        losses = [float(np.mean(np.concatenate(side))) for side in (self._losses, self._exported.losses)]
        agrees = np.concatenate(self._choices) == np.concatenate(self._exported.choices)
        return {
            "num_tokens": self._num_seen,
            "num_distributions": len(divergences),
            "perplexity_original": finite(_exp(losses[0])),
            "perplexity_exported": finite(_exp(losses[1])),
            "perplexity_ratio": finite(_exp(losses[1] - losses[0])),
            "agreement": float(agrees.mean()),
            "kl_mean": finite(float(divergences.mean())),
            "kl_p99": finite(float(np.quantile(divergences, 0.99))),
            "kl_max": finite(float(divergences.max())),
        }

    def logits(self, expected: Sequence[np.ndarray] = (), found: Sequence[np.ndarray] = ()) -> dict[str, Any]:
        """Differences of the logits (V,) that were kept, and of others that are given."""
        differences = [*self._differences, *map(difference, expected, found)]
        largest = float(np.max([each[0] for each in differences]))
        scale = max([self._max_logit, *map(_largest, expected)])
        return {
            "num_positions": len(differences),
            "max_difference": finite(largest),
            "mean_difference": finite(float(np.mean([each[1] for each in differences]))),
            "max_relative_difference": finite(largest / max(scale, 1e-9)),
            "max_logit": scale,
        }


def allowed(logits: torch.Tensor, suppressed: Sequence[int]) -> torch.Tensor:
    """Logits (S, V) with −inf for the tokens that are never chosen."""
    return logits.index_fill(-1, torch.tensor(suppressed), -torch.inf) if suppressed else logits


def difference(left: np.ndarray, right: np.ndarray) -> tuple[float, float]:
    """Largest and mean |left − right|. Some models set logits to −inf; two of these do not differ."""
    found = np.abs(np.subtract(left, right, out=np.zeros_like(left), where=left != right))
    return float(found.max()), float(found.mean())


def _largest(logits: np.ndarray) -> float:
    return float(np.abs(logits[np.isfinite(logits)]).max(initial=0.0))


def _losses(logits: torch.Tensor, targets: Sequence[int]) -> np.ndarray:
    losses = torch.nn.functional.cross_entropy(logits, torch.tensor(list(targets)), reduction="none")
    found: np.ndarray = losses.double().numpy()
    return found


def _kl(original: np.ndarray, exported: np.ndarray) -> float:
    """KL divergence in nats of two rows of logits (V,). In double precision: its terms cancel."""
    expected = torch.log_softmax(torch.from_numpy(original).double(), -1)
    found = torch.log_softmax(torch.from_numpy(exported).double(), -1)
    weights = expected.exp()
    return float(torch.where(weights > 0, weights * (expected - found), 0.0).sum())


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
