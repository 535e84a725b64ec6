"""What should be loaded where, through every change of what is served."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control_plane.registry.desired import ModelIntent, desired_places
from control_plane.registry.places import Place, model_of, possible_places

pytestmark = pytest.mark.unit


def chat(number: int) -> Place:
    return Place("chat", number)


def canary(number: int) -> Place:
    return Place("chat.canary", number)


def desired(production: int | None, wanted: list[int], *loaded: Place) -> set[Place]:
    return set(desired_places(ModelIntent("chat", production, dict.fromkeys(wanted, "d")), loaded))


def test_production_is_in_the_model_and_what_is_newer_beside_it() -> None:
    assert desired(2, [1, 2, 3]) == {chat(1), chat(2), canary(3)}


def test_without_production_nothing_is_where_unversioned_requests_would_meet_it() -> None:
    assert desired(None, [1]) == {canary(1)}


def test_promoted_canary_stays_where_it_is_until_it_is_in_the_model() -> None:
    assert desired(2, [2], canary(2), chat(1)) == {canary(2), chat(2), chat(1)}
    assert desired(2, [2], canary(2), chat(1), chat(2)) == {chat(2)}


def test_the_version_before_stands_in_until_the_new_one_is_in_the_model() -> None:
    assert desired(3, [3], canary(3), chat(1), chat(2)) == {canary(3), chat(3), chat(2)}


def test_a_version_that_was_rolled_back_from_leaves_the_model_at_once() -> None:
    assert desired(1, [1, 2], chat(1), chat(2)) == {chat(1), canary(2)}


def test_a_version_that_nobody_wants_is_not_kept() -> None:
    assert desired(2, [2], chat(1), chat(2), canary(3)) == {chat(2)}


@given(
    production=st.none() | st.integers(1, 5),
    wanted=st.sets(st.integers(1, 5)),
    loaded=st.sets(st.builds(Place, st.sampled_from(["chat", "chat.canary"]), st.integers(1, 5))),
)
def test_nothing_above_production_is_in_the_model_and_no_wanted_version_that_answers_is_dropped(
    production: int | None, wanted: set[int], loaded: set[Place]
) -> None:
    wanted |= set() if production is None else {production}
    found = desired(production, sorted(wanted), *loaded)
    assert all(place.version <= (production or 0) for place in found if place.model == "chat")
    assert {place.version for place in found} >= wanted
    assert all(model_of(place) == "chat" for place in found)
    for number in wanted:
        is_reachable = [place for place in possible_places("chat", number) if place in loaded]
        only_above = is_reachable == [chat(number)] and number > (production or 0)
        if is_reachable and not only_above:
            assert any(place in found for place in is_reachable)
