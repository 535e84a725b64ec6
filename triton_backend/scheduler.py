"""What the next step computes: which waiting requests start, which prompts advance, which sequences decode.

Lower ``priority`` first, then first come, first served. Every step decodes all running sequences (one token each) and
spends what is left of the token budget on prompts, so that a long prompt is cut into chunks and cannot stall the
streams. The source text of an encoder–decoder counts like a prompt but cannot be cut; one that is longer than the
budget has a step's budget to itself. A request starts when rows for all its sequences are free or can be taken from
requests of less priority, which are copied out and later copied back; no more rows are out than the cache has. Nobody
starves: who was overtaken ``MAX_OVERTAKEN`` times, be it with a prompt half computed, is next and is not preempted.
Standard library only, no tensors, no clock; owned by the engine thread.

    waiting ──start──► prefilling ──last chunk──► running ──stop, length, error──► gone
       ▲                   │                         │
       └────── preempt ────┴─────────────────────────┘
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from triton_backend.adapter_manager import AdapterManager, AdapterPlacement, AdapterRef
from triton_backend.cache_manager import CacheManager, RowCopy, RowMove
from triton_backend.config import EngineConfig
from triton_backend.sequence import RequestState, Sequence

MAX_OVERTAKEN = 64
MAX_PROBES = 16
"""Probes that wait for the row that is kept for them."""


@dataclass(frozen=True)
class RowSave:
    """Row ``row`` of a preempted ``sequence`` goes out of the cache; ``num_kept`` tokens of it may stay for others."""

    sequence: Sequence
    row: int
    num_kept: int


@dataclass(frozen=True)
class Start:
    """``state`` has rows now, and its adapter a slot; a request that was preempted gets its saved rows back."""

    state: RequestState
    adapter: AdapterPlacement
    is_resumed: bool


@dataclass(frozen=True)
class PrefillChunk:
    """``length`` prompt tokens of ``state``'s leading sequence, from ``start`` on, after ``prefix`` was copied.

    A request with a source text has one chunk: its source is encoded first, then the decoder's short prompt.
    """

    state: RequestState
    start: int
    length: int
    prefix: RowCopy | None = None

    @property
    def is_last(self) -> bool:
        return self.start + self.length == self.state.num_prompt_tokens


@dataclass
class StepPlan:
    """One step, in the order in which the engine does it."""

    saves: list[RowSave] = field(default_factory=list)
    copies: list[RowCopy | RowMove] = field(default_factory=list)
    starts: list[Start] = field(default_factory=list)
    decodes: tuple[Sequence, ...] = ()
    prefills: tuple[PrefillChunk, ...] = ()

    def drop_removed(self) -> None:
        """Leave out requests that were removed after the plan was made."""
        self.decodes = tuple(sequence for sequence in self.decodes if sequence.row >= 0)
        self.prefills = tuple(chunk for chunk in self.prefills if chunk.state.lead.row >= 0)


class Scheduler:
    """Owner of all requests from arrival to end.

    ``max_logits_positions`` bounds the chunks of prompts whose log probabilities are wanted at every position.
    """

    def __init__(self, config: EngineConfig, num_adapter_slots: int = 0, max_logits_positions: int = 128) -> None:
        self._config = config
        self._max_logits_positions = max_logits_positions
        self._cache = CacheManager(config.max_num_seqs, config.enable_prefix_caching, not config.deterministic)
        self._adapters = AdapterManager(num_adapter_slots)
        self._waiting: list[RequestState] = []
        self._prefilling: list[RequestState] = []
        self._running: list[RequestState] = []
        self._probes: deque[RequestState] = deque()
        self._num_arrived = 0

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

    def is_full(self, state: RequestState) -> bool:
        """Whether there is no place for ``state``: neither in a row nor in the queue behind the rows."""
        if state.request.health_probe:
            return len(self._probes) >= MAX_PROBES
        # Who was preempted has been let in already.
        num_new = sum(not waiting.num_preemptions for waiting in self._waiting)
        return num_new >= self._config.max_queue_size + self._cache.num_free

    def states(self) -> Iterator[RequestState]:
        yield from (*self._probes, *self._running, *self._prefilling, *self._waiting)

    def add(self, state: RequestState) -> None:
        """Queue a request; the caller has checked ``is_full``. Probes have a row of their own and never queue."""
        state.arrival = self._num_arrived
        self._num_arrived += 1
        (self._probes if state.request.health_probe else self._waiting).append(state)

    def schedule(self) -> StepPlan:
        """Plan the next step and mark its sequences; the plan must then be run."""
        plan = StepPlan()
        self._admit(plan)
        self._compact(plan)
        plan.decodes = tuple(sequence for state in self._running for sequence in state.decoding)
        plan.prefills = (*self._plan_probe(), *self._plan_prefills(len(plan.decodes)))
        return plan

    def finish_prefill(self, state: RequestState) -> None:
        """The whole prompt is computed: its sequences decode from the next step on."""
        if state.params.is_beam:
            state.beams = [state.lead]
        for sequence in state.decoding:
            sequence.num_computed = state.num_prompt_tokens
        if not state.request.health_probe:
            self._prefilling.remove(state)
            self._running.append(state)

    def release(self, sequence: Sequence) -> int:
        """Take back a sequence's row; returns how many tokens may stay in it for others."""
        if sequence.row < self._cache.probe_row:
            return self._cache.release(sequence)
        sequence.row = -1
        return 0

    def remove(self, state: RequestState) -> None:
        """Forget a request that ended or was cancelled, at whatever stage it is; its rows were released."""
        assert all(sequence.row < 0 for sequence in state.sequences)
        for queue in (self._prefilling, self._running):
            if state in queue:
                queue.remove(state)
                self._adapters.release(state.adapter)
        for waiting in (self._waiting, self._probes):
            if state in waiting:
                waiting.remove(state)

    def forget_shared(self) -> None:
        """A plan was not carried out, and its requests were removed: nothing that it moved may be used again."""
        self._cache.forget_contents()
        self._adapters.forget_all()

    def forget_adapter(self, adapter: AdapterRef) -> None:
        """It could not be loaded; all requests that wanted it were removed, after chunks of theirs had been planned."""
        self._cache.forget_contents()
        self._adapters.forget(adapter)

    def check_integrity(self) -> None:
        """Raise AssertionError unless rows are held by exactly the unfinished sequences; run by tests."""
        self._cache.check_integrity()
        self._adapters.check_integrity()
        holders = [
            sequence
            for state in (*self._prefilling, *self._running)
            for sequence in state.sequences
            if not sequence.is_finished
        ]
        rows = [sequence.row for sequence in holders]
        assert -1 not in rows and len(rows) == len(set(rows)) == self._cache.num_used
        assert all(s.row == -1 for state in self._waiting for s in state.sequences)

    def _admit(self, plan: StepPlan) -> None:
        """Start waiting requests, most urgent first, until one finds no room."""
        if not self._waiting or not (self._cache.num_free or self._can_preempt()):
            return
        self._waiting.sort(key=_urgency)
        for state in tuple(self._waiting):
            if not self._adapters.can_acquire(state.adapter):
                if _is_starving(state):
                    return
                continue  # its adapter must wait for a slot; others need not
            if not self._make_room(state, plan):
                return
            self._start(state, plan)

    def _can_preempt(self) -> bool:
        return min(s.params.priority for s in self._waiting) < max(
            (s.params.priority for s in (*self._running, *self._prefilling)), default=0
        )

    def _make_room(self, state: RequestState, plan: StepPlan) -> bool:
        """Free enough rows for ``state``, if need be by preempting; False, with nothing changed, if that cannot be."""
        missing = _num_rows(state) - self._cache.num_free
        are_out = [other for other in self._waiting if other.num_preemptions and other is not state]
        room = self._config.max_num_seqs - sum(map(_num_rows, are_out))
        victims = []
        for other in sorted((*self._running, *self._prefilling), key=_urgency, reverse=True):
            if missing <= 0:
                break
            if other.params.priority > state.params.priority and not _is_starving(other):
                victims.append(other)
                missing -= _num_rows(other)
                room -= _num_rows(other)
        if missing > 0 or (victims and room < 0):
            return False
        for victim in victims:
            self._preempt(victim, plan)
        return True

    def _preempt(self, state: RequestState, plan: StepPlan) -> None:
        for sequence in state.sequences:
            if (row := sequence.row) >= 0:
                plan.saves.append(RowSave(sequence, row, self._cache.release(sequence)))
        self.remove(state)
        state.num_preemptions += 1
        self._waiting.append(state)

    def _start(self, state: RequestState, plan: StepPlan) -> None:
        self._waiting.remove(state)
        for other in self._waiting:
            other.num_overtaken += other.arrival < state.arrival
        for sequence in state.sequences:
            if not sequence.is_finished:
                plan.copies += self._cache.allocate(sequence)
        is_prefilled = state.lead.num_prefill_tokens_left <= 0
        (self._running if is_prefilled else self._prefilling).append(state)
        plan.starts.append(Start(state, self._adapters.acquire(state.adapter), state.num_preemptions > 0))

    def _compact(self, plan: StepPlan) -> None:
        # A prompt still being computed keeps holes cheap to leave: it, or the next request, fills them soon.
        if self._waiting or self._prefilling:
            return
        while copies := self._cache.compact():
            plan.copies += copies

    def _plan_probe(self) -> tuple[PrefillChunk, ...]:
        if not self._probes:
            return ()
        state = self._probes[0]
        state.lead.row = self._cache.probe_row
        return (PrefillChunk(state, 0, state.num_prompt_tokens),)

    def _plan_prefills(self, num_decodes: int) -> tuple[PrefillChunk, ...]:
        """The most urgent first. While streams are running, which wait for the whole step, it has a share of tokens for
        every request whose prompt is being computed. Who can finish with what is left of them takes it, since long
        chunks cost less per token; who cannot has its own share and no more, so that a long prompt delays nobody.
        """
        budget = self._config.max_num_batched_tokens - num_decodes
        share = self._config.long_prefill_token_threshold if num_decodes else budget
        budget = min(budget, share * len(self._prefilling))
        chunks: list[PrefillChunk] = []
        for state in sorted(self._prefilling, key=_urgency):
            limit = budget if state.lead.num_prefill_tokens_left <= budget else share
            fits = 0 < limit <= budget or (budget > 0 and not chunks)
            chunk = self._next_chunk(state, min(limit, budget), is_first=not chunks) if fits else None
            if chunk is None:
                break
            chunks.append(chunk)
            budget -= len(state.source_ids) + chunk.length
        served = {chunk.state for chunk in chunks}
        for state in self._prefilling:
            state.num_overtaken += state not in served and any(state.arrival < other.arrival for other in served)
        return tuple(chunks)

    def _next_chunk(self, state: RequestState, budget: int, is_first: bool) -> PrefillChunk | None:
        """The next part of a prompt. A source is encoded in a step with room for it, or that encodes nothing else."""
        lead, prefix = state.lead, None
        if state.source_ids:
            if len(state.source_ids) + lead.num_prompt_tokens > budget and not is_first:
                return None
            budget = lead.num_prompt_tokens
        elif not state.has_started:
            prefix = self._cache.share_prefix(lead)
            state.num_cached_tokens = lead.num_computed
        state.has_started = True
        if state.params.prompt_logprobs is not None:
            budget = min(budget, self._max_logits_positions)
        chunk = PrefillChunk(state, lead.num_computed, min(lead.num_prefill_tokens_left, budget), prefix)
        lead.num_computed += chunk.length
        return chunk


def _urgency(state: RequestState) -> tuple[bool, int, int]:
    return (not _is_starving(state), state.params.priority, state.arrival)


def _is_starving(state: RequestState) -> bool:
    return state.num_overtaken >= MAX_OVERTAKEN


def _num_rows(state: RequestState) -> int:
    return sum(not sequence.is_finished for sequence in state.sequences)
