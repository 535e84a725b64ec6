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
    observe,
    pause_s,
    record,
)

pytestmark = pytest.mark.unit
CHAT = Desired(version=1, fingerprint=7, load_limit_s=120)


class World:
    """Plays the loop: ``look`` returns what is begun, ``end`` reports how it went."""

    def __init__(self, **desired: Desired) -> None:
        self.desired = desired or {"chat": CHAT}
        self.index: dict[tuple[str, int], str] | None = {}
        self.records: dict[str, Record] = {}
        self.now = 100.0
        self.unreachable_since: float | None = None

    def look(self, after_s: float = 0.5) -> list[Action]:
        self.now += after_s
        self.records = observe(self.desired, self.index, self.records, self.now)
        actions = decide(self.desired, self.index, self.records, self.now, 2.0, self.unreachable_since)
        for action in actions:
            self.records = begin(self.records, action, self.now)
        return actions

    def verbs(self, after_s: float = 0.5) -> list[tuple[Verb, str | None]]:
        return [(action.verb, action.model) for action in self.look(after_s)]

    def end(self, verb: Verb, verdict: Verdict, message: str | None = None, model: str = "chat") -> None:
        outcome = Outcome(Action(verb, model, 1), verdict, "Reason" if message else None, message)
        self.records = record(self.records, outcome, self.now)

    def load(self) -> None:
        assert self.verbs() == [(Verb.LOAD, "chat")]
        self.index = {("chat", 1): "READY"}
        self.end(Verb.LOAD, Verdict.SUCCEEDED)

    @property
    def chat(self) -> Record:
        return self.records["chat"]


def test_missing_model_is_loaded_once_and_then_probed_every_interval() -> None:
    world = World()
    assert world.verbs() == [(Verb.LOAD, "chat")]
    assert world.chat.state == "Loading"
    world.index = {("chat", 1): "LOADING"}
    assert world.verbs() == []
    world.index = {("chat", 1): "READY"}
    world.end(Verb.LOAD, Verdict.SUCCEEDED)
    assert world.chat.state == "Loaded"
    assert world.verbs(0.5) == []
    assert world.verbs(2.0) == [(Verb.PROBE, "chat")]
    assert world.verbs(2.0) == [], "one probe at a time"
    world.end(Verb.PROBE, Verdict.SUCCEEDED)
    assert world.verbs(2.5) == [(Verb.PROBE, "chat")]


def test_model_that_triton_has_already_is_probed_not_loaded() -> None:
    world = World()
    world.index = {("chat", 1): "READY"}
    assert world.verbs() == [(Verb.PROBE, "chat")]
    world.end(Verb.PROBE, Verdict.SUCCEEDED)
    assert world.chat.state == "Loaded"


def test_dead_process_is_reloaded_at_once_although_triton_calls_it_ready() -> None:
    world = World()
    world.load()
    assert world.verbs(2.5) == [(Verb.PROBE, "chat")]
    world.end(Verb.PROBE, Verdict.FAILED, "not healthy")
    assert (world.chat.state, world.chat.message) == ("Pending", "not healthy")
    assert world.verbs() == [(Verb.RELOAD, "chat")]
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
        assert world.verbs(pauses[-1] + 0.5) == [(Verb.RELOAD, "chat")]
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
    assert world.verbs(1.5) == [(Verb.LOAD, "chat")]
    world.end(Verb.LOAD, Verdict.FAILED, "still")
    assert world.verbs(9.0) == []
    assert world.verbs(1.5) == [(Verb.LOAD, "chat")]
    assert [pause_s(n) for n in (1, 2, 3, 7, 50)] == [5, 10, 20, 300, 300]


def test_changed_files_are_tried_at_once() -> None:
    world = World()
    world.look()
    world.end(Verb.LOAD, Verdict.FAILED, "damaged")
    assert world.verbs() == []
    world.desired = {"chat": Desired(1, 8, 120)}
    assert world.verbs() == [(Verb.LOAD, "chat")]


def test_changed_files_of_a_loaded_model_change_nothing() -> None:
    world = World()
    world.load()
    world.desired = {"chat": Desired(1, 8, 120)}
    assert world.verbs(0.5) == []
    assert world.chat.state == "Loaded"


def test_new_version_is_loaded_while_the_old_one_serves() -> None:
    world = World()
    world.load()
    world.desired = {"chat": Desired(2, 9, 120)}
    assert world.look() == [Action(Verb.LOAD, "chat", 2, 120, is_alone=True)]


def test_removed_model_is_unloaded_and_forgotten() -> None:
    world = World()
    world.load()
    world.desired = {}
    assert world.verbs() == [(Verb.UNLOAD, "chat")]
    assert world.verbs() == []
    world.end(Verb.UNLOAD, Verdict.SUCCEEDED)
    assert world.records == {} and world.verbs() == []


def test_foreign_models_in_tritons_index_are_left_alone() -> None:
    world = World()
    world.load()
    world.index = {("chat", 1): "READY", ("somebody_elses", 1): "READY"}
    assert world.verbs(0.5) == []


def test_nothing_is_done_while_triton_is_away_and_everything_is_loaded_when_it_is_back() -> None:
    world = World()
    world.load()
    world.index = None
    assert world.verbs(2.5) == []
    assert (world.chat.state, world.chat.reason) == ("Pending", "RuntimeUnhealthy")
    world.index = {}
    assert world.verbs() == [(Verb.LOAD, "chat")]


def test_triton_that_was_restarted_between_two_looks_is_given_its_models_again() -> None:
    world = World()
    world.load()
    world.index = {}
    assert world.verbs() == [(Verb.LOAD, "chat")]


def test_load_that_meets_a_dying_triton_is_no_failure_of_the_model() -> None:
    world = World()
    world.look()
    world.end(Verb.LOAD, Verdict.UNKNOWN, "Triton does not answer")
    assert (world.chat.state, world.chat.num_failures) == ("Pending", 0)
    assert world.verbs(1.5) == [(Verb.LOAD, "chat")]


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
        world.index = {("chat", 1): "LOADING"}
    world.look()
    world.index = {("chat", 1): "LOADING"}
    assert world.chat.state == "Loading"
    assert world.verbs(119) == []
    assert world.verbs(2) == [(Verb.RESTART_TRITON, "chat")]
    world.end(Verb.RESTART_TRITON, Verdict.FAILED, "took too long")
    assert world.chat.state == "FailedToLoad"
    world.index = {}
    assert world.verbs(1) == []
    assert world.verbs(5) == [(Verb.LOAD, "chat")]


def test_triton_that_hangs_is_restarted() -> None:
    world = World()
    world.index, world.unreachable_since = None, 100.0
    assert world.verbs(UNREACHABLE_S - 1) == []
    assert world.verbs(2) == [(Verb.RESTART_TRITON, None)]


def test_slow_load_of_one_model_delays_no_other() -> None:
    world = World(chat=CHAT, large=Desired(1, 1, 600))
    assert {model for _, model in world.verbs()} == {"chat", "large"}
    world.index = {("chat", 1): "READY", ("large", 1): "LOADING"}
    world.end(Verb.LOAD, Verdict.SUCCEEDED)
    assert world.verbs(300) == [(Verb.PROBE, "chat")]
