"""Arrivals, lengths, ends and cancels in any order never lose a row, a token or a request."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triton_backend.adapter_manager import AdapterRef
from triton_backend.config import EngineConfig
from triton_backend.scheduler import MAX_OVERTAKEN, MAX_PROBES
from triton_backend.sequence import FinishReason

from .rows_in_words import DrivenScheduler, request

pytestmark = pytest.mark.unit

A, B, C = (AdapterRef(name, "1") for name in "abc")


def config(max_num_seqs=4, max_num_batched_tokens=8, max_queue_size=3, **options):
    return EngineConfig(1024, max_num_seqs, max_num_batched_tokens, max_queue_size, **options)


def source(num_source_tokens: int, n=1):
    """A request to an encoder–decoder: the decoder's own prompt is one token."""
    return request(1, n=n, source_ids=tuple(range(num_source_tokens)))


def run(scheduler: DrivenScheduler, plan):
    """What the engine does with a plan, without tensors."""
    scheduler.rows.run(plan)


def finish(scheduler, state):
    for sequence in state.sequences:
        sequence.finish_reason = FinishReason.STOP
        scheduler.release(sequence)
    scheduler.remove(state)


def test_a_long_prompt_is_cut_into_chunks_that_leave_room_for_running_streams():
    scheduler = DrivenScheduler(config())
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


def test_a_short_urgent_prompt_does_not_wait_for_a_long_one():
    scheduler = DrivenScheduler(config(max_num_batched_tokens=40, long_prefill_token_threshold=4))
    stream, long, urgent = request(2), request(200), request(6, priority=-10)
    scheduler.add(stream)
    run(scheduler, scheduler.schedule())
    for state in (long, urgent):
        scheduler.add(state)
    chunks = []
    while not scheduler_has_finished_prefill(urgent):
        plan = scheduler.schedule()
        chunks.append([(chunk.state, chunk.length) for chunk in plan.prefills])
        run(scheduler, plan)
    assert chunks == [[(urgent, 6)]]


def test_a_long_prompt_that_came_before_does_not_delay_short_ones():
    scheduler = DrivenScheduler(config(max_num_batched_tokens=40, long_prefill_token_threshold=4))
    stream, long, *short = request(2), request(200), request(7), request(6), request(9)
    scheduler.add(stream)
    run(scheduler, scheduler.schedule())
    for state in (long, *short[:2]):
        scheduler.add(state)
    plan = scheduler.schedule()
    # 12 tokens for three: the long one has its share, the first that can finish with the rest does, in one chunk.
    assert [(chunk.state, chunk.length) for chunk in plan.prefills] == [(long, 4), (short[0], 7)]


def scheduler_has_finished_prefill(state):
    return bool(state.lead.output_ids)


def test_requests_start_in_order_of_arrival_and_a_wide_one_is_not_overtaken():
    scheduler = DrivenScheduler(config(max_num_batched_tokens=64))
    first, wide, late = request(3, n=2), request(3, n=4), request(3, n=1)
    for state in (first, wide, late):
        scheduler.add(state)
    run(scheduler, scheduler.schedule())
    assert first.lead.output_ids and not wide.lead.output_ids and not late.lead.output_ids
    finish(scheduler, first)
    run(scheduler, scheduler.schedule())
    assert wide.lead.output_ids and not late.lead.output_ids


def test_forks_of_a_request_start_together_from_one_prefill():
    scheduler = DrivenScheduler(config())
    state = request(5, n=3)
    scheduler.add(state)
    plan = scheduler.schedule()
    assert [chunk.length for chunk in plan.prefills] == [5]
    run(scheduler, plan)
    assert len(scheduler.schedule().decodes) == 3


def test_a_hole_is_filled_by_the_next_request_or_else_by_moving_the_top_row_down():
    scheduler = DrivenScheduler(config(max_num_batched_tokens=64))
    states = [request(3) for _ in range(3)]
    for state in states:
        scheduler.add(state)
    run(scheduler, scheduler.schedule())
    finish(scheduler, states[0])
    scheduler.add(newcomer := request(3))
    plan = scheduler.schedule()
    assert plan.copies == [] and newcomer.lead.row == 0
    run(scheduler, plan)
    finish(scheduler, states[1])
    moves = scheduler.schedule().copies
    assert [(move.source, move.target) for move in moves] == [(2, 1)]
    assert states[2].lead.row == 1


def test_a_probe_runs_at_once_in_its_own_row_while_everything_is_full():
    scheduler = DrivenScheduler(config(max_num_seqs=1, max_num_batched_tokens=8))
    scheduler.add(request(3))
    run(scheduler, scheduler.schedule())
    for _ in range(3):
        scheduler.add(request(3))
    assert scheduler.is_full(request(3)) and not scheduler.is_full(request(1, probe=True))
    scheduler.add(probe := request(1, probe=True))
    plan = scheduler.schedule()
    assert [chunk.state for chunk in plan.prefills] == [probe]
    assert probe.lead.row == 1
    assert len(plan.decodes) == 1
    run(scheduler, plan)
    finish(scheduler, probe)
    scheduler.check_integrity()


def test_probes_are_bounded_too():
    scheduler = DrivenScheduler(config())
    for _ in range(MAX_PROBES):
        scheduler.add(request(1, probe=True))
    assert scheduler.is_full(request(1, probe=True))
    for _ in range(MAX_PROBES):
        plan = scheduler.schedule()
        run(scheduler, plan)
        finish(scheduler, plan.prefills[0].state)
    assert not scheduler.has_work


def test_requests_that_arrive_together_fill_the_free_rows_and_then_the_queue():
    scheduler, num_taken = DrivenScheduler(config(max_num_seqs=4, max_queue_size=3)), 0
    while not scheduler.is_full(state := request(3)):
        scheduler.add(state)
        num_taken += 1
    assert num_taken == 7
    run(scheduler, scheduler.schedule())
    assert (scheduler.num_running, scheduler.num_waiting, scheduler.is_full(request(3))) == (4, 3, True)


def test_a_prompt_that_is_half_computed_does_not_starve_behind_urgent_ones():
    scheduler = DrivenScheduler(config(max_num_seqs=8, max_num_batched_tokens=16))
    scheduler.add(patient := request(40, priority=5))
    run(scheduler, scheduler.schedule())
    assert patient.has_started
    for _ in range(40 * MAX_OVERTAKEN):
        # Urgent prompts that take the whole budget of every step, without end.
        while scheduler.num_running + scheduler.num_waiting < 8:
            scheduler.add(request(16, priority=0))
        plan = scheduler.schedule()
        run(scheduler, plan)
        for state in {sequence.state for sequence in plan.decodes} - {patient}:
            finish(scheduler, state)
        if patient.lead.output_ids:
            break
    assert patient.lead.output_ids


def test_no_more_rows_are_taken_out_than_the_cache_has():
    scheduler = DrivenScheduler(config(max_num_seqs=2, max_num_batched_tokens=64, max_queue_size=99))
    num_out = []
    for urgency in range(5):
        for _ in range(2):
            scheduler.add(request(3, priority=-urgency))
        run(scheduler, scheduler.schedule())
        num_out.append(sum(state.num_preemptions > 0 for state in scheduler.states() if state.lead.row < 0))
    assert num_out == [0, 2, 2, 2, 2]


def test_who_was_preempted_takes_no_place_in_the_queue():
    scheduler = DrivenScheduler(config(max_num_seqs=2, max_num_batched_tokens=64, max_queue_size=2))
    for priority in (5, 0):
        for _ in range(2):
            scheduler.add(request(3, priority=priority))
        run(scheduler, scheduler.schedule())
    assert scheduler.num_waiting == 2 and not scheduler.is_full(request(3))


def test_sources_share_a_step_only_as_far_as_its_budget_goes():
    scheduler = DrivenScheduler(config())
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
    scheduler = DrivenScheduler(config())
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


def test_a_request_of_more_urgency_takes_the_rows_of_the_least_urgent_newest_one():
    scheduler = DrivenScheduler(config(max_num_seqs=2, max_num_batched_tokens=64))
    rows = scheduler.rows
    old, new = request(3, priority=1), request(4, priority=1)
    for state in (old, new):
        scheduler.add(state)
    rows.run(scheduler.schedule())
    scheduler.add(urgent := request(5, priority=0))
    plan = scheduler.schedule()
    assert {save.sequence.state for save in plan.saves} == {new}
    rows.run(plan)
    assert urgent.lead.output_ids and new.lead.row == -1 and new.num_preemptions == 1
    before = list(new.lead.output_ids)
    finish(scheduler, urgent)
    plan = scheduler.schedule()
    assert [(start.state, start.is_resumed) for start in plan.starts] == [(new, True)]
    rows.run(plan)
    assert new.lead.output_ids[: len(before)] == before and len(new.lead.output_ids) == len(before) + 1


def test_requests_of_equal_urgency_never_take_rows_from_each_other():
    scheduler = DrivenScheduler(config(max_num_seqs=1, max_num_batched_tokens=64))
    for _ in range(2):
        scheduler.add(request(3))
        plan = scheduler.schedule()
        assert not plan.saves
        run(scheduler, plan)


def test_a_request_that_was_overtaken_often_is_next_and_keeps_its_rows():
    scheduler = DrivenScheduler(config(max_num_seqs=1, max_num_batched_tokens=64, max_queue_size=1000))
    rows = scheduler.rows
    scheduler.add(running := request(3, priority=0))
    rows.run(scheduler.schedule())
    scheduler.add(patient := request(3, priority=9))
    num_before = 0
    while not patient.lead.output_ids:
        scheduler.add(urgent := request(3, priority=0))
        finish(scheduler, running)
        rows.run(scheduler.schedule())
        running = urgent
        num_before += 1
        assert num_before <= MAX_OVERTAKEN + 1
    assert patient.num_overtaken == MAX_OVERTAKEN
    assert not scheduler.schedule().saves, "it is not preempted again"


def test_a_prompt_takes_what_another_row_holds_of_it_and_computes_one_token_at_least():
    scheduler = DrivenScheduler(config(max_num_batched_tokens=64))
    rows = scheduler.rows
    first, again, longer = request(30), request(30), request(40)
    lengths = []
    for state in (first, again, longer):
        scheduler.add(state)
        plan = scheduler.schedule()
        lengths.append([chunk.length for chunk in plan.prefills])
        rows.run(plan)
    assert lengths == [[30], [1], [10]]
    assert (first.num_cached_tokens, again.num_cached_tokens, longer.num_cached_tokens) == (0, 29, 30)


def test_two_requests_that_arrive_together_share_their_prompt():
    scheduler = DrivenScheduler(config(max_num_batched_tokens=64))
    for _ in range(2):
        scheduler.add(request(30))
    plan = scheduler.schedule()
    assert [chunk.length for chunk in plan.prefills] == [30, 1]
    run(scheduler, plan)


def test_what_a_finished_request_left_is_found_after_its_row_was_given_away():
    scheduler = DrivenScheduler(config(max_num_batched_tokens=64))
    rows = scheduler.rows
    for word in range(3):
        scheduler.add(state := request(30, word=word))
        rows.run(scheduler.schedule())
        finish(scheduler, state)
    for word in range(3):
        scheduler.add(state := request(30, word=word))
        rows.run(scheduler.schedule())
        assert state.num_cached_tokens == 29, word
        finish(scheduler, state)


def test_nothing_is_shared_between_adapters_nor_when_caching_is_off():
    for options, adapters in (({}, (A, B)), ({"enable_prefix_caching": False}, (None, None))):
        scheduler = DrivenScheduler(config(max_num_batched_tokens=64, **options), num_adapter_slots=2)
        for adapter in adapters:
            scheduler.add(state := request(30, adapter=adapter))
            run(scheduler, scheduler.schedule())
            assert state.num_cached_tokens == 0


PROMPTS = st.tuples(st.integers(1, 40), st.integers(0, 2))


@given(
    options=st.fixed_dictionaries({"deterministic": st.booleans(), "enable_prefix_caching": st.booleans()}),
    events=st.lists(
        st.one_of(
            st.tuples(st.just("add"), PROMPTS, st.integers(1, 4), st.integers(0, 2), st.sampled_from([None, A, B, C])),
            st.tuples(st.just("beams"), PROMPTS, st.integers(2, 4), st.integers(0, 2)),
            st.tuples(st.just("source"), st.integers(1, 40), st.integers(1, 4)),
            st.tuples(st.just("finish"), st.integers(0, 9), st.integers(0, 3)),
            st.tuples(st.just("cancel"), st.integers(0, 9)),
            st.tuples(st.just("step"), st.integers(1, 4)),
        ),
        max_size=60,
    ),
)
@settings(max_examples=300, deadline=None)
def test_any_schedule_keeps_rows_and_requests_whole_and_computes_every_token_after_its_own_past(options, events):
    scheduler, alive = DrivenScheduler(config(max_num_batched_tokens=12, **options), num_adapter_slots=2), []
    rows = scheduler.rows

    def add(state):
        if not scheduler.is_full(state):
            alive.append(state)
            scheduler.add(state)

    def step():
        plan = scheduler.schedule()
        encoded = sum(len(chunk.state.source_ids) for chunk in plan.prefills)
        computed = sum(chunk.length for chunk in plan.prefills) + len(plan.decodes)
        assert computed <= 12
        assert computed + encoded <= 12 or (encoded and len(plan.prefills) == 1)
        assert all(chunk.is_last for chunk in plan.prefills if chunk.state.source_ids)
        assert all(chunk.length > 0 for chunk in plan.prefills)
        assert computed > 0 or not alive
        rows.run(plan)

    for name, *args in events:
        if name == "add":
            (length, word), n, priority, adapter = args
            add(request(length, word=word, n=n, priority=priority, adapter=adapter))
        elif name == "beams":
            (length, word), beam_width, priority = args
            add(request(length, word=word, beam_width=beam_width, priority=priority))
        elif name == "source":
            add(source(*args))
        elif name == "step":
            for _ in range(args[0]):
                step()
        elif name == "cancel" and args[0] < len(alive):
            rows.remove(alive.pop(args[0]))
        elif name == "finish" and args[0] < len(alive):
            state = alive[args[0]]
            sequence = state.sequences[args[1] % len(state.sequences)]
            if state.search is not None:
                rows.remove(alive.pop(args[0]))
            elif sequence.output_ids and not sequence.is_finished and sequence.row >= 0:
                sequence.finish_reason = FinishReason.STOP
                scheduler.release(sequence)
                if state.is_finished:
                    rows.remove(alive.pop(args[0]))
        scheduler.check_integrity()
        assert set(scheduler.states()) == set(alive)
    for _ in range(2000):
        if not alive:
            break
        for state in [state for state in alive if state.decoding and state.decoding[0].output_ids]:
            rows.remove(state)
            alive.remove(state)
        if alive:
            step()
    assert not alive, "somebody starved"
    scheduler.check_integrity()
    assert not scheduler.has_work and scheduler.cache_usage == 0
