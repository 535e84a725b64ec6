"""/api/v1/system with a real Redis and a real worker: the worker is there with its queues, and gone when it is."""

from __future__ import annotations

import httpx
import pytest

from control_plane.auth.services import create_key
from control_plane.client import ControlPlane
from tests.integration.control_plane.processes import wait_for

pytestmark = pytest.mark.integration


def test_workers_are_told_with_the_queues_they_consume(app, start_worker, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(app.extensions["system_report"]._report, "_ttl_s", 0.0)
    with app.app_context():
        key = create_key("test", "operator")
    llmos = ControlPlane("http://llmos", key, transport=httpx.WSGITransport(app))
    assert llmos.system()["workers"] == {"error": None, "workers": []}
    worker = start_worker()
    wait_for(lambda: llmos.system()["workers"]["workers"], 30, "the worker's answer")
    found = llmos.system()
    (told,) = found["workers"]["workers"]
    assert told["name"].startswith("w0@") and told["queues"] == ["default"]
    assert found["redis"]["error"] is None and found["redis"]["memory_bytes"] > 0
    worker.kill()
    assert llmos.system()["workers"]["workers"] == []
