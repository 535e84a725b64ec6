"""What the next step computes: which waiting requests start, which prompts advance, which rows decode.

First come, first served. Every step decodes all running sequences (one token each) and spends what is left of the
token budget on prompts, in order of arrival, so that a long prompt is cut into chunks and cannot stall the streams.
The source text of an encoder–decoder counts like a prompt but cannot be cut; one that is longer than the budget has a
step's budget to itself. A request starts only when rows for all its n sequences are free; later ones do not overtake
it, so it cannot starve.
Standard library only, no tensors, no clock; owned by the engine thread.

    waiting ──admit──► prefilling ──last chunk──► running ──stop, length, error──► gone
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from triton_backend.cache_manager import CacheManager, RowMove
from triton_backend.config import EngineConfig
from triton_backend.sequence import RequestState, Sequence, SequenceStatus


@dataclass(frozen=True)
class PrefillChunk:
    """``length`` prompt tokens of ``state``'s leading sequence, from ``start`` on.

    A request with a source text has one chunk: its source is encoded first, then the decoder's short prompt.
    """

    state: RequestState
    start: int
    length: int

    @property
    def is_last(self) -> bool:
        return self.start + self.length == self.state.num_prompt_tokens


@dataclass(frozen=True)
class StepPlan:
    """One step, in the order in which the runner does it: moves, prefills, decodes."""

    moves: tuple[RowMove, ...]
    prefills: tuple[PrefillChunk, ...]
    decodes: tuple[Sequence, ...]


class Scheduler:
    """Owner of all requests from arrival to end."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._cache = CacheManager(config.max_num_seqs)
        self._waiting: deque[RequestState] = deque()
        self._prefilling: list[RequestState] = []
        self._running: list[RequestState] = []
        self._probes: deque[RequestState] = deque()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests that hold cache rows."""
        return len(self._prefilling) + len(self._running)

    @property
    def cache_usage(self) -> float:
        """Used cache rows as a fraction between 0 and 1."""
        return self._cache.num_used / self._config.max_num_seqs

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._prefilling or self._running or self._probes)

    @property
    def is_full(self) -> bool:
        return len(self._waiting) >= self._config.max_queue_size

    def states(self) -> Iterator[RequestState]:
        yield from (*self._probes, *self._running, *self._prefilling, *self._waiting)

    def add(self, state: RequestState) -> None:
        """Queue a request; the caller has checked ``is_full``. Probes have a row of their own and never queue."""
        (self._probes if state.request.health_probe else self._waiting).append(state)

    def schedule(self) -> StepPlan:
        """Plan the next step and mark its sequences; the plan must then be run."""
        self._admit()
        moves = self._compact()
        decodes = tuple(sequence for state in self._running for sequence in state.sequences if not sequence.is_finished)
        prefills = (*self._plan_probe(), *self._plan_prefills(self._config.max_num_batched_tokens - len(decodes)))
        return StepPlan(moves, prefills, decodes)

    def finish_prefill(self, state: RequestState) -> None:
        """The whole prompt is computed: the leading sequence and its forks decode from the next step on."""
        for sequence in state.sequences:
            sequence.status = SequenceStatus.RUNNING
            sequence.num_computed = state.num_prompt_tokens
        if not state.request.health_probe:
            self._prefilling.remove(state)
            self._running.append(state)

    def release(self, sequence: Sequence) -> None:
        """Take back the row of a finished sequence."""
        sequence.status = SequenceStatus.FINISHED
        if 0 <= sequence.row < self._cache.probe_row:
            self._cache.release(sequence)

    def remove(self, state: RequestState) -> None:
        """Forget a request that ended or was cancelled, at whatever stage it is, and take back its rows."""
        for sequence in state.sequences:
            self.release(sequence)
        for queue in (self._waiting, self._prefilling, self._running, self._probes):
            if state in queue:
                queue.remove(state)

    def check_integrity(self) -> None:
        """Raise AssertionError unless rows are held by exactly the unfinished sequences; run by tests."""
        self._cache.check_integrity()
        holders = [
            sequence
            for state in (*self._prefilling, *self._running)
            for sequence in state.sequences
            if not sequence.is_finished
        ]
        assert sorted(s.row for s in holders) == sorted(set(s.row for s in holders))
        assert len(holders) == self._cache.num_used
        assert all(s.row == -1 for state in self._waiting for s in state.sequences)

    def _admit(self) -> None:
        while self._waiting and len(self._waiting[0].sequences) <= self._cache.num_free:
            state = self._waiting.popleft()
            for sequence in state.sequences:
                self._cache.allocate(sequence)
                sequence.status = SequenceStatus.PREFILLING
            self._prefilling.append(state)

    def _compact(self) -> tuple[RowMove, ...]:
        # A prompt still being computed keeps holes cheap to leave: it, or the next request, fills them soon.
        if self._waiting or self._prefilling:
            return ()
        moves = []
        while move := self._cache.compact():
            moves.append(move)
        return tuple(moves)

    def _plan_probe(self) -> tuple[PrefillChunk, ...]:
        if not self._probes:
            return ()
        state = self._probes[0]
        state.lead.row = self._cache.probe_row
        return (PrefillChunk(state, 0, state.num_prompt_tokens),)

    def _plan_prefills(self, budget: int) -> tuple[PrefillChunk, ...]:
        chunks: list[PrefillChunk] = []
        for state in self._prefilling:
            left = state.lead.num_prefill_tokens_left
            if state.source_ids:
                fits = len(state.source_ids) + left <= budget
                length = left if fits or not chunks else 0
            else:
                length = chunk_length(left, budget)
            if length == 0:
                break
            chunks.append(PrefillChunk(state, state.lead.num_computed, length))
            state.lead.num_computed += length
            budget -= len(state.source_ids) + length
        return tuple(chunks)


def chunk_length(num_left: int, budget: int) -> int:
    """Tokens of a prompt to compute now, given ``num_left`` to go; 0 if the budget is too small.

    No chunk but that of a one-token prompt has length 1: attention takes its decode path for a single token, whose last
    bits differ, and the same prompt must give the same bits however it is cut.
    """
    if num_left <= budget:
        return num_left
    length = budget - 1 if num_left - budget == 1 else budget
    return length if length >= 2 else 0
