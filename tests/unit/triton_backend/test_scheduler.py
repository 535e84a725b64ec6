"""Arrivals, lengths, ends and cancels in any order never lose a row, a token or a request."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triton_backend.config import EngineConfig
from triton_backend.protocol import GenerateRequest
from triton_backend.sampling_params import SamplingParams
from triton_backend.scheduler import Scheduler, chunk_length
from triton_backend.sequence import FinishReason, RequestState, SampledToken

pytestmark = pytest.mark.unit


def config(max_num_seqs=4, max_num_batched_tokens=8, max_queue_size=3):
    return EngineConfig(1024, max_num_seqs, max_num_batched_tokens, max_queue_size)


def request(num_prompt_tokens=3, n=1, probe=False, num_source_tokens=0) -> RequestState:
    generate = GenerateRequest("r", SamplingParams(n=n), health_probe=probe)
    source_ids = tuple(range(num_source_tokens))
    return RequestState.create(generate, tuple(range(num_prompt_tokens)), sink=None, now_s=0.0, source_ids=source_ids)


def source(num_source_tokens: int, n=1) -> RequestState:
    """A request to an encoder–decoder: the decoder's own prompt is one token."""
    return request(1, n, num_source_tokens=num_source_tokens)


def run(scheduler: Scheduler, plan):
    """What the engine does with a plan, without tensors."""
    for sequence in plan.decodes:
        sequence.append(SampledToken(0))
    for chunk in plan.prefills:
        if chunk.is_last:
            scheduler.finish_prefill(chunk.state)
            for sequence in chunk.state.sequences:
                sequence.append(SampledToken(0))


def finish(scheduler, state):
    for sequence in state.sequences:
        sequence.finish_reason = FinishReason.STOP
        scheduler.release(sequence)
    scheduler.remove(state)


def test_a_long_prompt_is_cut_into_chunks_that_leave_room_for_running_streams():
    scheduler = Scheduler(config())
    short, long = request(2), request(20)
    scheduler.add(short)
    run(scheduler, scheduler.schedule())
    scheduler.add(long)
    lengths = []
    while not scheduler_has_finished_prefill(long):
        plan = scheduler.schedule()
        assert [sequence.state for sequence in plan.decodes] == [short]
        lengths += [chunk.length for chunk in plan.prefills]
        run(scheduler, plan)
    assert lengths == [7, 7, 6]


def scheduler_has_finished_prefill(state):
    return bool(state.lead.output_ids)


def test_requests_start_in_order_of_arrival_and_a_wide_one_is_not_overtaken():
    scheduler = Scheduler(config(max_num_batched_tokens=64))
    first, wide, late = request(n=2), request(n=4), request(n=1)
    for state in (first, wide, late):
        scheduler.add(state)
    run(scheduler, scheduler.schedule())
    assert first.lead.output_ids and not wide.lead.output_ids and not late.lead.output_ids
    finish(scheduler, first)
    run(scheduler, scheduler.schedule())
    assert wide.lead.output_ids and not late.lead.output_ids


def test_forks_of_a_request_start_together_from_one_prefill():
    scheduler = Scheduler(config())
    state = request(num_prompt_tokens=5, n=3)
    scheduler.add(state)
    plan = scheduler.schedule()
    assert [chunk.length for chunk in plan.prefills] == [5]
    run(scheduler, plan)
    assert len(scheduler.schedule().decodes) == 3


def test_a_hole_is_filled_by_the_next_request_or_else_by_moving_the_top_row_down():
    scheduler = Scheduler(config(max_num_batched_tokens=64))
    states = [request() for _ in range(3)]
    for state in states:
        scheduler.add(state)
    run(scheduler, scheduler.schedule())
    finish(scheduler, states[0])
    scheduler.add(newcomer := request())
    plan = scheduler.schedule()
    assert plan.moves == () and newcomer.lead.row == 0
    run(scheduler, plan)
    finish(scheduler, states[1])
    moves = scheduler.schedule().moves
    assert [(move.source, move.target) for move in moves] == [(2, 1)]
    assert states[2].lead.row == 1


def test_a_probe_runs_at_once_in_its_own_row_while_everything_is_full():
    scheduler = Scheduler(config(max_num_seqs=1, max_num_batched_tokens=8))
    scheduler.add(request())
    run(scheduler, scheduler.schedule())
    for _ in range(3):
        scheduler.add(request())
    assert scheduler.is_full
    scheduler.add(probe := request(num_prompt_tokens=1, probe=True))
    plan = scheduler.schedule()
    assert [chunk.state for chunk in plan.prefills] == [probe]
    assert probe.lead.row == 1
    assert len(plan.decodes) == 1
    run(scheduler, plan)
    scheduler.remove(probe)
    scheduler.check_integrity()


def test_sources_share_a_step_only_as_far_as_its_budget_goes():
    scheduler = Scheduler(config())
    states = [source(num_source_tokens) for num_source_tokens in (3, 3, 1)]
    for state in states:
        scheduler.add(state)
    plan = scheduler.schedule()
    assert [(chunk.state, chunk.start, chunk.length) for chunk in plan.prefills] == [
        (states[0], 0, 1),
        (states[1], 0, 1),
    ]
    run(scheduler, plan)
    assert [chunk.state for chunk in scheduler.schedule().prefills] == [states[2]]


def test_a_source_longer_than_the_budget_is_encoded_whole_in_a_step_that_encodes_nothing_else():
    scheduler = Scheduler(config())
    before, long, after = source(2), source(100), source(2)
    for state in (before, long, after):
        scheduler.add(state)
    encoded = []
    for _ in range(3):
        plan = scheduler.schedule()
        encoded.append([chunk.state for chunk in plan.prefills])
        run(scheduler, plan)
    assert encoded == [[before], [long], [after]]
    assert len(plan.decodes) == 2, "running streams go on beside it"


@given(num_left=st.integers(1, 5000), budget=st.integers(0, 5000))
def test_no_chunk_has_length_one_unless_the_prompt_does(num_left, budget):
    length = chunk_length(num_left, budget)
    assert length <= budget
    assert length != 1 or num_left == 1
    assert num_left - length != 1 or length == 0
    if budget >= 3:
        assert length > 0


@given(
    events=st.lists(
        st.one_of(
            st.tuples(st.just("add"), st.integers(1, 40), st.integers(1, 4)),
            st.tuples(st.just("source"), st.integers(1, 40), st.integers(1, 4)),
            st.tuples(st.just("finish"), st.integers(0, 9), st.integers(0, 3)),
            st.tuples(st.just("cancel"), st.integers(0, 9)),
            st.tuples(st.just("step")),
        ),
        max_size=80,
    )
)
@settings(max_examples=200, deadline=None)
def test_any_schedule_keeps_rows_and_requests_whole(events):
    scheduler, alive = Scheduler(config()), []
    for name, *args in events:
        if name == "add" and not scheduler.is_full:
            alive.append(request(*args))
            scheduler.add(alive[-1])
        elif name == "source" and not scheduler.is_full:
            alive.append(source(*args))
            scheduler.add(alive[-1])
        elif name == "step":
            plan = scheduler.schedule()
            encoded = sum(len(chunk.state.source_ids) for chunk in plan.prefills)
            computed = sum(chunk.length for chunk in plan.prefills) + len(plan.decodes)
            assert computed <= 8
            assert computed + encoded <= 8 or (encoded and len(plan.prefills) == 1)
            assert all(chunk.is_last for chunk in plan.prefills if chunk.state.source_ids)
            assert computed > 0 or not alive
            assert [sequence.row for sequence in plan.decodes] == [
                row for row in (sequence.row for sequence in plan.decodes) if 0 <= row < 4
            ]
            run(scheduler, plan)
        elif name == "cancel" and args[0] < len(alive):
            scheduler.remove(alive.pop(args[0]))
        elif name == "finish" and args[0] < len(alive):
            state = alive[args[0]]
            sequence = state.sequences[args[1] % len(state.sequences)]
            if sequence.output_ids and not sequence.is_finished:
                sequence.finish_reason = FinishReason.STOP
                scheduler.release(sequence)
                if state.is_finished:
                    scheduler.remove(alive.pop(args[0]))
        scheduler.check_integrity()
        assert set(scheduler.states()) == set(alive)
    for state in alive:
        scheduler.remove(state)
    scheduler.check_integrity()
    assert not scheduler.has_work and scheduler.cache_usage == 0
