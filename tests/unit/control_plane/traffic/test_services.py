"""Windows are made of minutes and hours that cover them once, and reach no further back than what is kept."""

from __future__ import annotations

import time
from datetime import timedelta

import pytest

from control_plane.extensions import db
from control_plane.registry import deployments, services, serving_state
from control_plane.registry.places import Place
from control_plane.registry.tables import Deployment
from control_plane.traffic.recorder import HOUR_S, KEPT_S, MINUTE_S
from control_plane.traffic.services import compare, window_since
from tests.unit.control_plane.conftest import say_loaded
from tests.unit.control_plane.registry.conftest import sealed

pytestmark = pytest.mark.unit
NOW_S = 1_000_000 * HOUR_S + 754.5


@pytest.mark.parametrize("age_s", [0, 59, 60, 754, 755, 3600, 7200, 24.5 * HOUR_S])
def test_slots_cover_every_minute_since_then_once(age_s):
    window = window_since(NOW_S - age_s, NOW_S)
    minutes: list[int] = []
    for slot in window.slots("chat", 1):
        minutes += range(slot.number * slot.length_s // MINUTE_S, (slot.number + 1) * slot.length_s // MINUTE_S)
    assert minutes[0] == window.minute == int(NOW_S - age_s) // MINUTE_S
    assert len(minutes) == len(set(minutes)) and int(NOW_S) // MINUTE_S in minutes


@pytest.mark.parametrize("age_s", [25.2 * HOUR_S, 26 * HOUR_S, 30 * 24 * HOUR_S, 365 * 24 * HOUR_S])
def test_minutes_that_are_kept_no_longer_are_not_asked_for(age_s):
    window = window_since(NOW_S - age_s, NOW_S)
    slots = window.slots("chat", 1)
    assert all(slot.length_s == HOUR_S for slot in slots) and len(slots) <= 31 * 24 + 1
    assert NOW_S - slots[0].number * HOUR_S <= min(age_s + MINUTE_S, KEPT_S[HOUR_S])
    assert window.seconds == NOW_S - slots[0].number * HOUR_S


def test_a_canary_began_when_its_version_became_it_not_when_its_weight_changed(app, settings, tmp_path):
    with app.app_context():
        db.create_all()
        for salt in "ab":
            services.register("chat", sealed(tmp_path / salt, salt))
        deployments.adopt_production("chat", 1)
        say_loaded(settings, Place("chat", 1), Place("chat.canary", 2))

        serving = serving_state.read(settings)
        for kind, weight in (("canary", 10.0), ("abort", None), ("canary", 5.0), ("canary", 50.0)):
            deployments.deploy("chat", kind, lambda: serving, number=2 if weight else None, weight=weight)
        rows = db.session.query(Deployment).filter(Deployment.kind == "canary").order_by(Deployment.id).all()
        for hours, row in zip((3, 2, 1), rows, strict=True):
            row.finished_at -= timedelta(hours=hours)
        db.session.commit()
        found = compare(app.extensions["traffic"], "chat", 5)
        age_s = found["since_canary"]["seconds"]
        assert 2 * HOUR_S <= age_s < 2 * HOUR_S + 65, "the second canary, not the first one, nor its weight"
        assert found["since_canary"]["canary"]["version"] == 2 and found["recent"]["production"]["version"] == 1
        assert 4 * MINUTE_S <= found["recent"]["seconds"] <= 5 * MINUTE_S + 1
        assert abs(time.time() - found["recent"]["since"].timestamp()) < 24 * HOUR_S
