"""What the reconciler decides, second by second, without a Triton."""

from __future__ import annotations

import pytest

from control_plane.registry.decisions import (
    UNREACHABLE_S,
    Action,
    Desired,
    Outcome,
    Record,
    Verb,
    Verdict,
    begin,
    decide,
    loaded_places,
    observe,
    pause_s,
    record,
)
from control_plane.registry.places import Place

pytestmark = pytest.mark.unit
CHAT = Desired(digest="a", fingerprint=7, load_limit_s=120)
ONE, TWO = Place("chat", 1), Place("chat", 2)


class World:
    """Plays the loop: ``look`` returns what is begun, ``end`` reports how it went."""

    def __init__(self, desired: dict[Place, Desired] | None = None) -> None:
        self.desired = desired or {ONE: CHAT}
        self.index: dict[Place, str] | None = {}
        self.records: dict[Place, Record] = {}
        self.now = 100.0
        self.unreachable_since: float | None = None

    def look(self, after_s: float = 0.5) -> list[Action]:
        self.now += after_s
        self.records = observe(self.desired, self.index, self.records, self.now)
        actions = decide(self.desired, self.index, self.records, self.now, 2.0, self.unreachable_since)
        for action in actions:
            self.records = begin(self.records, action, self.now)
        return actions

    def verbs(self, after_s: float = 0.5) -> list[tuple[Verb, Place | None]]:
        return [(action.verb, action.place) for action in self.look(after_s)]

    def end(self, verb: Verb, verdict: Verdict, message: str | None = None, place: Place = ONE) -> None:
        outcome = Outcome(Action(verb, place), verdict, "Reason" if message else None, message)
        self.records = record(self.records, outcome, self.now)

    def load(self) -> None:
        assert self.verbs() == [(Verb.LOAD, ONE)]
        self.index = {ONE: "READY"}
        self.end(Verb.LOAD, Verdict.SUCCEEDED)

    @property
    def chat(self) -> Record:
        return self.records[ONE]


def test_missing_model_is_loaded_once_and_then_probed_every_interval() -> None:
    world = World()
    assert world.verbs() == [(Verb.LOAD, ONE)]
    assert world.chat.state == "Loading"
    world.index = {ONE: "LOADING"}
    assert world.verbs() == []
    world.index = {ONE: "READY"}
    world.end(Verb.LOAD, Verdict.SUCCEEDED)
    assert world.chat.state == "Loaded"
    assert world.verbs(0.5) == []
    assert world.verbs(2.0) == [(Verb.PROBE, ONE)]
    assert world.verbs(2.0) == [], "one probe at a time"
    world.end(Verb.PROBE, Verdict.SUCCEEDED)
    assert world.verbs(2.5) == [(Verb.PROBE, ONE)]


def test_model_that_triton_has_already_is_probed_not_loaded() -> None:
    world = World()
    world.index = {ONE: "READY"}
    assert world.verbs() == [(Verb.PROBE, ONE)]
    world.end(Verb.PROBE, Verdict.SUCCEEDED)
    assert world.chat.state == "Loaded"


def test_dead_process_is_reloaded_at_once_although_triton_calls_it_ready() -> None:
    world = World()
    world.load()
    assert world.verbs(2.5) == [(Verb.PROBE, ONE)]
    world.end(Verb.PROBE, Verdict.FAILED, "not healthy")
    assert (world.chat.state, world.chat.message) == ("Pending", "not healthy")
    assert world.verbs() == [(Verb.RELOAD, ONE)]
    assert world.chat.message == "not healthy", "the reason stays readable while it is loaded again"
    world.end(Verb.RELOAD, Verdict.SUCCEEDED)
    assert (world.chat.state, world.chat.message) == ("Loaded", None)


def test_model_that_keeps_dying_is_reloaded_with_growing_pauses_and_forgiven_when_stable() -> None:
    world = World()
    world.load()
    pauses = []
    for _ in range(3):
        world.look(2.5)
        world.end(Verb.PROBE, Verdict.FAILED, "died")
        pauses.append(world.chat.retry_at - world.now)
        assert world.verbs(pauses[-1] + 0.5) == [(Verb.RELOAD, ONE)]
        world.end(Verb.RELOAD, Verdict.SUCCEEDED)
    assert pauses == [0.0, 5.0, 10.0]
    for _ in range(30):
        world.look(2.5)
        world.end(Verb.PROBE, Verdict.SUCCEEDED)
    assert world.chat.num_failures == 0


def test_failing_load_is_retried_with_growing_pauses_and_its_reason_is_kept() -> None:
    world = World()
    world.look()
    world.end(Verb.LOAD, Verdict.FAILED, "model.onnx.data differs")
    assert (world.chat.state, world.chat.message) == ("FailedToLoad", "model.onnx.data differs")
    assert world.verbs(4.0) == []
    assert world.verbs(1.5) == [(Verb.LOAD, ONE)]
    world.end(Verb.LOAD, Verdict.FAILED, "still")
    assert world.verbs(9.0) == []
    assert world.verbs(1.5) == [(Verb.LOAD, ONE)]
    assert [pause_s(n) for n in (1, 2, 3, 7, 50)] == [5, 10, 20, 300, 300]


def test_changed_files_are_tried_at_once() -> None:
    world = World()
    world.look()
    world.end(Verb.LOAD, Verdict.FAILED, "damaged")
    assert world.verbs() == []
    world.desired = {ONE: Desired("a", 8, 120)}
    assert world.verbs() == [(Verb.LOAD, ONE)]


def test_changed_files_of_a_loaded_model_change_nothing() -> None:
    world = World()
    world.load()
    world.desired = {ONE: Desired("a", 8, 120)}
    assert world.verbs(0.5) == []
    assert world.chat.state == "Loaded"


def test_new_version_is_loaded_beside_the_old_one() -> None:
    world = World()
    world.load()
    world.desired = {ONE: CHAT, TWO: Desired("b", 0, 120)}
    assert world.look() == [Action(Verb.LOAD, TWO, "b", keep=(1,), load_limit_s=120)]


def test_one_change_at_a_time_for_each_model_of_triton() -> None:
    canary = Place("chat.canary", 3)
    world = World({ONE: CHAT, TWO: CHAT, canary: CHAT})
    assert world.verbs() == [(Verb.LOAD, ONE), (Verb.LOAD, canary)]
    assert world.verbs() == []
    world.index = {ONE: "READY"}
    world.end(Verb.LOAD, Verdict.SUCCEEDED)
    assert world.verbs() == [(Verb.LOAD, TWO)]


def test_what_is_left_over_is_unloaded_before_anything_is_loaded_and_others_stay() -> None:
    world = World({ONE: CHAT, Place("chat", 3): CHAT})
    world.index = {ONE: "READY", TWO: "READY"}
    assert world.look() == [
        Action(Verb.UNLOAD, TWO, keep=(1,)),
        Action(Verb.PROBE, ONE, "a", keep=(2,), load_limit_s=120),
    ]
    world.end(Verb.UNLOAD, Verdict.FAILED, "no", TWO)
    assert world.verbs(1.0) == [(Verb.LOAD, Place("chat", 3))], "and tried again after a pause"
    world.end(Verb.LOAD, Verdict.SUCCEEDED, place=Place("chat", 3))
    assert (Verb.UNLOAD, TWO) in world.verbs(10.0)


def test_version_that_triton_loads_anew_by_itself_answers_on_and_may_get_stuck() -> None:
    world = World()
    world.load()
    world.index = {ONE: "LOADING"}
    assert world.verbs(100) == [] and world.chat.state == "Loaded"
    assert world.verbs(119) == []
    assert world.verbs(2) == [(Verb.RESTART_TRITON, ONE)]


def test_version_that_is_being_unloaded_is_not_counted_on_when_it_is_wanted_again() -> None:
    world = World({ONE: CHAT, TWO: CHAT})
    world.index = {ONE: "READY", TWO: "READY"}
    world.look()
    for place in (ONE, TWO):
        world.end(Verb.PROBE, Verdict.SUCCEEDED, place=place)
    world.desired = {ONE: CHAT}
    assert world.verbs() == [(Verb.UNLOAD, TWO)]
    world.desired = {ONE: CHAT, TWO: CHAT}
    assert world.verbs() == []
    assert loaded_places(world.index, world.records) == {ONE}
    assert world.records[TWO].state == "Pending"
    world.end(Verb.UNLOAD, Verdict.SUCCEEDED, place=TWO)
    world.index = {ONE: "READY"}
    assert world.verbs() == [(Verb.LOAD, TWO)]


def test_another_folder_under_the_same_number_is_another_version() -> None:
    world = World()
    world.look()
    world.end(Verb.LOAD, Verdict.FAILED, "damaged")
    world.desired = {ONE: Desired("b", 9, 120)}
    assert world.verbs() == [(Verb.LOAD, ONE)]
    assert world.chat.num_failures == 0


def test_removed_model_is_unloaded_and_forgotten() -> None:
    world = World()
    world.load()
    world.desired = {}
    assert world.verbs() == [(Verb.UNLOAD, ONE)]
    assert world.verbs() == []
    world.end(Verb.UNLOAD, Verdict.SUCCEEDED)
    world.index = {ONE: "UNLOADING"}
    assert world.records == {} and world.verbs() == []


def test_nothing_is_done_while_triton_is_away_and_everything_is_loaded_when_it_is_back() -> None:
    world = World()
    world.load()
    world.index = None
    assert world.verbs(2.5) == []
    assert (world.chat.state, world.chat.reason) == ("Pending", "RuntimeUnhealthy")
    world.index = {}
    assert world.verbs() == [(Verb.LOAD, ONE)]


def test_triton_that_was_restarted_between_two_looks_is_given_its_models_again() -> None:
    world = World()
    world.load()
    world.index = {}
    assert world.verbs() == [(Verb.LOAD, ONE)]


def test_load_that_meets_a_dying_triton_is_no_failure_of_the_model() -> None:
    world = World()
    world.look()
    world.end(Verb.LOAD, Verdict.UNKNOWN, "Triton does not answer")
    assert world.chat.state == "Pending"
    assert world.verbs(1.5) == [(Verb.LOAD, ONE)]


def test_a_version_whose_loads_always_take_triton_with_them_has_failed() -> None:
    world = World()
    for _ in range(3):
        world.look(2.0)
        world.end(Verb.LOAD, Verdict.UNKNOWN, "Triton does not answer")
    assert (world.chat.state, world.chat.num_failures) == ("FailedToLoad", 3)
    assert "Triton went away 3 times while it was loaded" in (world.chat.message or "")
    assert world.verbs(2.0) == []


def test_probe_that_finds_no_triton_changes_nothing() -> None:
    world = World()
    world.load()
    world.look(2.5)
    world.end(Verb.PROBE, Verdict.UNKNOWN)
    assert world.chat.state == "Loaded"


@pytest.mark.parametrize("begun_by_us", [True, False])
def test_load_that_never_ends_restarts_triton_and_then_waits(begun_by_us: bool) -> None:
    world = World()
    if not begun_by_us:
        world.index = {ONE: "LOADING"}
    world.look()
    world.index = {ONE: "LOADING"}
    assert world.chat.state == "Loading"
    assert world.verbs(119) == []
    assert world.verbs(2) == [(Verb.RESTART_TRITON, ONE)]
    world.end(Verb.RESTART_TRITON, Verdict.FAILED, "took too long")
    assert world.chat.state == "FailedToLoad"
    world.index = {}
    assert world.verbs(1) == []
    assert world.verbs(5) == [(Verb.LOAD, ONE)]


def test_triton_that_hangs_is_restarted() -> None:
    world = World()
    world.index, world.unreachable_since = None, 100.0
    assert world.verbs(UNREACHABLE_S - 1) == []
    assert world.verbs(2) == [(Verb.RESTART_TRITON, None)]


def test_slow_load_of_one_model_delays_no_other() -> None:
    large = Place("large", 1)
    world = World({ONE: CHAT, large: Desired("l", 1, 600)})
    assert {place for _, place in world.verbs()} == {ONE, large}
    world.index = {ONE: "READY", large: "LOADING"}
    world.end(Verb.LOAD, Verdict.SUCCEEDED)
    assert world.verbs(300) == [(Verb.PROBE, ONE)]
