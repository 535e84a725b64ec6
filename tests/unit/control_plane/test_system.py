"""/api/v1/system: whoever does not answer says why, and the others are told all the same."""

from __future__ import annotations

import time

import httpx
import pytest

from control_plane.auth.services import create_key
from control_plane.client import ApiError, ControlPlane
from control_plane.triton_fake import FakeTriton

pytestmark = pytest.mark.unit


@pytest.fixture
def connect(app):
    def connect(role: str) -> ControlPlane:
        with app.app_context():
            return ControlPlane("http://llmos", create_key(role, role), transport=httpx.WSGITransport(app))

    return connect


def test_every_part_answers_for_itself_and_those_that_are_away_say_so(connect):
    started_at = time.monotonic()
    found = connect("operator").system()
    assert time.monotonic() - started_at < 10
    assert found["triton"]["error"] is None and found["triton"]["version"] == "fake"
    assert found["triton"]["models"] == [{"name": "starter", "version": "3", "state": "READY", "reason": None}]
    assert found["database"]["kind"] == "sqlite" and found["database"]["version"].startswith("3.")
    assert "127.0.0.1:1" in found["redis"]["error"] and found["redis"]["version"] is None
    assert found["workers"]["error"] and found["workers"]["workers"] == []
    assert "supervisord does not answer" in found["supervisor"]["error"]
    assert [disk["name"] for disk in found["disks"]] == ["home", "model_repository"]
    assert 0 < found["memory"]["available_bytes"] <= found["memory"]["total_bytes"]
    assert found["versions"]["python"].startswith("3.")


def test_a_triton_that_is_away_is_an_answer_too(connect, triton: FakeTriton):
    triton.is_running = False
    found = connect("operator").system()["triton"]
    assert found["error"] and found["models"] == []


def test_it_is_for_operators(connect):
    with pytest.raises(ApiError, match="role") as refused:
        connect("developer").system()
    assert refused.value.status == 403
