"""Beam search for one request: which beams go on with which token, and what has been found.

The rules are those of Hugging Face ``generate`` (transformers 5, ``_beam_search``): of the best candidates over all
beams the first ``beam_width`` may end, the best that do not end go on, and the search is over when no beam can beat
what was found. Scores are float32, as there, so that close calls are the same. Beams in groups follow Vijayakumar et
al. 2016, "Diverse Beam Search": the groups choose one after another, each avoiding the tokens that earlier ones chose
in the same step, and each applies these rules for itself. It knows tokens and scores, not rows or logits.

    beams ──candidates──► best of all ─┬─ end token, stop string, length: hypotheses (at most beam_width a group)
                                       └─ the others: beams of the next step
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from triton_backend.sampling_params import SamplingParams

Ends = Callable[[int, int], bool]


@dataclass(frozen=True)
class Candidate:
    """One token that may follow a beam. ``key`` is what candidates are ordered by: ``logprob``, with noise if beams
    sample. ``logprobs`` is handed through to the hypothesis. ``is_forced``: the model leaves no choice."""

    token_id: int
    logprob: float
    key: float
    logprobs: tuple[Any, ...] = ()
    is_forced: bool = False


@dataclass(frozen=True)
class Extension:
    """A beam of the next step: beam ``parent`` of this one with ``token_id``."""

    parent: int
    token_id: int
    score: float
    logprob: float
    is_forced: bool = False


@dataclass(frozen=True)
class Hypothesis:
    """A text that was found. ``score`` is ``cumulative_logprob / length ** length_penalty``."""

    token_ids: tuple[int, ...]
    score: float
    cumulative_logprob: float
    finish_reason: str
    is_at_end_token: bool = False
    logprobs: tuple[tuple[Any, ...], ...] = ()


@dataclass(frozen=True)
class _Beam:
    """A linked list of tokens, so that branching costs nothing."""

    score: np.float32 = field(default=np.float32(0))
    past: _Beam | None = None
    candidate: Candidate | None = None

    def path(self) -> list[Candidate]:
        path, beam = [], self
        while beam.past is not None:
            assert beam.candidate is not None
            path.append(beam.candidate)
            beam = beam.past
        return path[::-1]


@dataclass(frozen=True)
class _Choice:
    """A candidate of the whole group: beam ``parent`` with ``candidate``."""

    parent: int
    candidate: Candidate
    score: np.float32
    key: float


class BeamSearch:
    """Owner of a request's beams and hypotheses. ``max_new_tokens`` ends every beam."""

    def __init__(self, params: SamplingParams, end_token_ids: frozenset[int], max_new_tokens: int) -> None:
        width = params.beam_width // params.num_beam_groups
        self._groups = [_Group(params, width, end_token_ids, max_new_tokens) for _ in range(params.num_beam_groups)]
        self._has_branched = False
        # Tokens that earlier groups chose fall behind others; there are at most beam_width of them.
        num_penalised = params.beam_width if params.num_beam_groups > 1 else 0
        self.num_candidates = self._groups[0].num_kept + num_penalised

    @property
    def is_finished(self) -> bool:
        return all(group.is_finished for group in self._groups)

    def advance(self, candidates: Sequence[Sequence[Candidate]], ends: Ends) -> list[Extension]:
        """Extend every beam by one token; returns the beams that go on, [] when the search is over.

        ``candidates`` has one list per beam, in falling order of key, in the order in which the beams were returned; at
        first there is one beam, the prompt. ``ends(parent, token_id)`` says whether that text completes a stop string.
        """
        extensions: list[Extension] = []
        chosen: Counter[int] = Counter()
        first = 0
        for group in self._groups:
            if group.is_finished:
                continue
            beams = range(first, first + len(group.beams)) if self._has_branched else range(1)
            found = group.advance([candidates[beam] for beam in beams], chosen, partial(_ends_in, ends, beams))
            chosen.update(group.chosen)
            extensions += [
                Extension(
                    beams[c.parent], c.candidate.token_id, float(c.score), c.candidate.logprob, c.candidate.is_forced
                )
                for c in found
            ]
            first = beams.stop
        self._has_branched = True
        return extensions

    def best(self, n: int) -> list[Hypothesis]:
        """The ``n`` hypotheses of highest score, best first."""
        found = [hypothesis for group in self._groups for hypothesis in group.hypotheses]
        return sorted(found, key=lambda hypothesis: -hypothesis.score)[:n]


def _ends_in(ends: Ends, beams: Sequence[int], parent: int, token_id: int) -> bool:
    return ends(beams[parent], token_id)


class _Group:
    """A beam search of its own; the only one unless ``num_beam_groups`` > 1."""

    def __init__(self, params: SamplingParams, width: int, end_token_ids: frozenset[int], max_new_tokens: int) -> None:
        self._params = params
        self._width = width
        self._end_token_ids = end_token_ids
        self._max_new_tokens = max_new_tokens
        self._length = 0
        self.num_kept = max(2, 1 + len(end_token_ids)) * width
        self.beams: list[_Beam] = [_Beam()]
        self.hypotheses: list[Hypothesis] = []
        self.chosen: list[int] = []
        self.is_finished = False

    def advance(self, candidates: Sequence[Sequence[Candidate]], chosen: Counter[int], ends: Ends) -> list[_Choice]:
        """The choices that go on, best first; [] when this group is done. ``chosen`` are tokens of earlier groups."""
        self._length += 1
        kept = self._best_choices(candidates, chosen)
        reasons = [self._end_reason(choice, ends) for choice in kept]
        going = [choice for choice, reason in zip(kept, reasons, strict=True) if reason != "stop"]
        self.chosen = [choice.candidate.token_id for choice in going[: self._width]]
        is_full = len(self.hypotheses) == self._width
        if not (is_full and self._params.early_stopping is True):
            self._find([item for item in zip(kept[: self._width], reasons, strict=False) if item[1] is not None])
        going_on = [choice for choice, reason in zip(kept, reasons, strict=True) if reason is None]
        going_on = sorted(going_on, key=lambda choice: -choice.score)[: self._width]  # drawn ones were in drawing order
        if not going_on and not self.hypotheses:
            self._give_up()
        self.is_finished = not going_on or self._is_over(going_on[0].score)
        past = self.beams
        self.beams = [] if self.is_finished else [_Beam(c.score, past[c.parent], c.candidate) for c in going_on]
        return [] if self.is_finished else going_on

    def _best_choices(self, candidates: Sequence[Sequence[Candidate]], chosen: Counter[int]) -> list[_Choice]:
        """The best of all beams' candidates, best first; at a tie the earlier beam, then the smaller token id."""
        choices = []
        for parent, (beam, mine) in enumerate(zip(self.beams, candidates, strict=True)):
            for candidate in mine:
                penalty = self._params.diversity_penalty * chosen[candidate.token_id]
                if candidate.logprob == -np.inf:
                    continue
                score = beam.score + (np.float32(candidate.logprob) - np.float32(penalty))
                noise = candidate.key - candidate.logprob
                choices.append(_Choice(parent, candidate, score, float(score) + noise))
        choices.sort(key=lambda choice: (-choice.key, choice.parent, choice.candidate.token_id))
        return choices[: self.num_kept]

    def _end_reason(self, choice: _Choice, ends: Ends) -> str | None:
        token_id = choice.candidate.token_id
        if choice.candidate.is_forced and self._length >= self._max_new_tokens:
            return "length"  # an end that is forced because there is no room is no end of the text
        if token_id in self._end_token_ids or ends(choice.parent, token_id):
            return "stop"
        return "length" if self._length >= self._max_new_tokens else None

    def _find(self, ended: Sequence[tuple[_Choice, str | None]]) -> None:
        """Keep the best hypotheses of those known and those that ended now."""
        for choice, reason in ended:
            beam = _Beam(choice.score, self.beams[choice.parent], choice.candidate)
            self.hypotheses.append(self._hypothesis(beam, self._length, reason or ""))
        self.hypotheses.sort(key=lambda hypothesis: -hypothesis.score)
        del self.hypotheses[self._width :]

    def _give_up(self) -> None:
        """Nothing may follow, and nothing ended: what there is is the result."""
        for beam in self.beams:
            if beam.past is not None:
                self.hypotheses.append(self._hypothesis(beam, self._length - 1, "stop"))

    def _hypothesis(self, beam: _Beam, length: int, reason: str) -> Hypothesis:
        path = beam.path()
        return Hypothesis(
            token_ids=tuple(candidate.token_id for candidate in path),
            score=float(self._normalised(beam.score, length)),
            cumulative_logprob=float(beam.score),
            finish_reason=reason,
            is_at_end_token=path[-1].token_id in self._end_token_ids,
            logprobs=tuple(candidate.logprobs for candidate in path if candidate.logprobs),
        )

    def _normalised(self, score: np.float32, length: int) -> np.float32:
        return score / np.float32(float(length) ** self._params.length_penalty)

    def _is_over(self, best_score: np.float32) -> bool:
        """Whether no beam can become better than the hypotheses; ``best_score`` is that of the best beam."""
        if len(self.hypotheses) < self._width:
            return False
        params, length = self._params, self._length
        if params.early_stopping is True:
            return True
        if params.early_stopping == "never" and params.length_penalty > 0:
            length = self._max_new_tokens  # a long text may yet have the best score
        return float(self._normalised(best_score, length)) <= self.hypotheses[-1].score
