"""The engine's part in a plan, with words for tensors: what a row holds is a list of what was computed there.

Every position remembers its token, its adapter and the whole past that it was computed after, so a row that was copied
wrongly, shared across adapters or overwritten is found at the next computation.
"""

from __future__ import annotations

import random
from typing import Any

from triton_backend import beam_rows
from triton_backend.beam_search import Candidate, Extension
from triton_backend.cache_manager import RowMove
from triton_backend.protocol import GenerateRequest
from triton_backend.sampling_params import SamplingParams
from triton_backend.scheduler import Scheduler, StepPlan
from triton_backend.sequence import RequestState, SampledToken, Sequence


def request(
    num_prompt_tokens: int,
    *,
    word: int = 0,
    source_ids: tuple[int, ...] = (),
    adapter: Any = None,
    probe: bool = False,
    **params: Any,
) -> RequestState:
    """Prompts of the same ``word`` begin alike, for as long as the shorter one is."""
    generate = GenerateRequest("r", SamplingParams(**params), health_probe=probe)
    prompt_ids = tuple(1000 * word + position for position in range(num_prompt_tokens))
    state = RequestState.create(generate, prompt_ids, None, 0.0, source_ids=source_ids, adapter=adapter)
    if state.params.is_beam:
        state.search = RandomSearch(state.params.beam_width)
    return state


class DrivenScheduler(Scheduler):
    """A scheduler with rows that do what it plans."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.rows = Rows(self)


class RandomSearch:
    """Beams that branch at random and never end."""

    is_finished = False
    num_candidates = 1

    def __init__(self, width: int) -> None:
        self._width = width
        self._random = random.Random(width)

    def advance(self, candidates: list[list[Candidate]], ends: Any) -> list[Extension]:
        num_beams = self._random.randint(1, self._width)
        choices = [(self._random.randrange(len(candidates)), token_id) for token_id in range(num_beams)]
        return [Extension(parent, token_id, 0.0, 0.0) for parent, token_id in choices]


class Rows:
    """Runs plans."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._rows: dict[int, list[tuple[Any, ...]]] = {}
        self._saved: dict[Sequence, list[tuple[Any, ...]]] = {}

    def run(self, plan: StepPlan) -> None:
        for save in plan.saves:
            self._saved[save.sequence] = list(self._row(save.row))
        for copy in plan.copies:
            if isinstance(copy, RowMove):
                self._rows[copy.target] = list(self._row(copy.source))
            else:
                self._copy(copy.source, copy.target, copy.start, copy.end)
        for start in plan.starts:
            for sequence in start.state.sequences:
                if sequence in self._saved:
                    assert start.is_resumed
                    self._rows[sequence.row] = self._saved.pop(sequence)
        for sequence in plan.decodes:
            self._compute(sequence, sequence.num_tokens - 1, [sequence.output_ids[-1]])
            sequence.num_computed = sequence.num_tokens
        for chunk in plan.prefills:
            self._prefill(chunk)
        for state in dict.fromkeys(s.state for s in plan.decodes):
            self._choose(state)
        for chunk in plan.prefills:
            if chunk.is_last:
                self._choose(chunk.state)

    def remove(self, state: RequestState) -> None:
        for sequence in state.sequences:
            self._saved.pop(sequence, None)
            if sequence.row >= 0:
                self._scheduler.release(sequence)
        self._scheduler.remove(state)

    def _prefill(self, chunk: Any) -> None:
        lead, prefix = chunk.state.lead, chunk.prefix
        if prefix is not None:
            self._copy(prefix.source, prefix.target, prefix.start, prefix.end)
        self._compute(lead, chunk.start, lead.prompt_ids[chunk.start : chunk.start + chunk.length])
        if chunk.is_last:
            self._scheduler.finish_prefill(chunk.state)
            for sequence in chunk.state.decoding[1:]:
                self._rows[sequence.row] = list(self._row(lead.row))

    def _choose(self, state: RequestState) -> None:
        if state.search is None:
            for sequence in state.decoding:
                sequence.append(SampledToken(7 + sequence.index))
            return
        candidates: list[list[Candidate]] = [[] for _ in state.beams]
        for copy in beam_rows.advance(state, candidates, lambda parent, token: False, lambda parent, child: None):
            self._copy(copy.source, copy.target, copy.start, copy.end)

    def _compute(self, sequence: Sequence, start: int, token_ids: Any) -> None:
        """Compute tokens at ``start``…, after checking that the row holds the sequence's own past."""
        row, past = self._row(sequence.row), (*sequence.prompt_ids, *sequence.output_ids)
        key = (sequence.state.adapter, sequence.state.source_ids)
        assert row[:start] == [(key, past[: position + 1]) for position in range(start)], "another past"
        for position, token_id in enumerate(token_ids, start):
            assert token_id == past[position]
            row[position:] = [(key, past[: position + 1])]

    def _copy(self, source: int, target: int, start: int, end: int) -> None:
        assert len(self._row(source)) >= end and len(self._row(target)) >= start
        self._row(target)[start:] = self._row(source)[start:end]

    def _row(self, row: int) -> list[tuple[Any, ...]]:
        return self._rows.setdefault(row, [])
