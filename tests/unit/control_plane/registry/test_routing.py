"""Names become versions and places; a canary gets its share, evenly, and the same people."""

from __future__ import annotations

import time

import pytest
from sqlalchemy.exc import OperationalError

from control_plane.errors import ModelNotReady, NotFound
from control_plane.extensions import db
from control_plane.registry import deployments, services, serving_state
from control_plane.registry.places import Place
from control_plane.registry.routing import Router
from control_plane.registry.serving_state import FAILED_TO_LOAD, LOADED, ModelState, ServingState
from control_plane.registry.tables import CANARY, Alias
from tests.unit.control_plane.registry.conftest import sealed

pytestmark = pytest.mark.unit
CHAT, NEW = Place("chat", 1), Place("chat.canary", 2)


@pytest.fixture
def router(app, settings, tmp_path) -> Router:
    """Production is 1, the canary 2 with 20 %, both are loaded; 3 is nowhere."""
    for salt in "abc":
        services.register("chat", sealed(tmp_path / salt, salt))
    deployments.adopt_production("chat", 1)
    model, version = services.get_model("chat"), services.get_version("chat", 2)
    db.session.add(Alias(model_id=model.id, name=CANARY, version_id=version.id, weight=20.0))
    db.session.commit()
    write(settings, {CHAT: LOADED, NEW: LOADED})
    return Router(app)


def write(settings, places: dict[Place, str]) -> None:
    states = {place: ModelState(place.version, state, 0.0, None, "why") for place, state in places.items()}
    serving_state.write(settings, ServingState({}, True, time.time(), states))


def test_names_lead_to_production_an_alias_or_a_version(router):
    assert {router.route("chat").place for _ in range(20)} == {CHAT, NEW}
    assert router.route("chat@production").place == CHAT
    assert router.route("chat@canary").place == NEW
    assert router.route("chat@2").place == NEW
    assert not router.route("chat@canary").is_canary


@pytest.mark.parametrize(
    ("name", "said"), [("nope", "does not exist"), ("chat@x", "chat@1, chat@2"), ("chat@3", "chat@1")]
)
def test_what_is_not_there_is_named(router, name, said):
    with pytest.raises(NotFound, match=said):
        router.route(name)


@pytest.mark.parametrize("weight", [0, 5, 20, 50, 100])
def test_shares_are_met_within_a_thousand_requests(router, weight):
    db.session.query(Alias).filter_by(name=CANARY).update({"weight": weight})
    db.session.commit()
    num_canary = sum(router.route("chat").is_canary for _ in range(1000))
    assert abs(num_canary - weight * 10) <= 5


def test_the_same_user_stays_on_one_side_and_users_are_split(router):
    sides = {user: {router.route("chat", user).is_canary for _ in range(5)} for user in map(str, range(1000))}
    assert all(len(found) == 1 for found in sides.values())
    assert abs(sum(True in found for found in sides.values()) - 200) < 50


def test_a_canary_that_is_not_loaded_costs_nobody_an_answer(router, settings):
    write(settings, {CHAT: LOADED, NEW: FAILED_TO_LOAD})
    assert {router.route("chat").place for _ in range(50)} == {CHAT}
    with pytest.raises(ModelNotReady, match="version 2 of model 'chat' is not ready: why"):
        router.route("chat@canary")


def test_a_version_is_found_where_it_is_loaded_now(router, settings):
    assert router.route("chat@2").place == NEW
    write(settings, {CHAT: LOADED, Place("chat", 2): LOADED})
    assert router.route("chat@2", max_age_s=0).place == Place("chat", 2)


def test_it_goes_on_with_what_it_knew_while_the_database_does_not_answer(router, monkeypatch):
    assert router.route("chat@production").place == CHAT

    def locked(*_: object) -> None:
        raise OperationalError("SELECT", {}, Exception("database is locked"))

    monkeypatch.setattr(db.session, "execute", locked)
    assert router.route("chat@production", max_age_s=0).place == CHAT


def test_served_are_those_whose_production_is_loaded(router, settings):
    assert [route.name for route in router.served()] == ["chat"]
    write(settings, {NEW: LOADED})
    assert router.production_versions() == {"chat": 1}
    time.sleep(0.25)
    assert router.served() == []
