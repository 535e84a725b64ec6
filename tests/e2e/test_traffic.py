"""Traffic of a real installation: counted with times of the real engine, kept through a restart of the web server."""

from __future__ import annotations

import httpx
import pytest

from control_plane.client import ControlPlane
from control_plane.launcher.supervisor import SupervisorClient
from tests.e2e.conftest import Stack, wait_for

pytestmark = pytest.mark.e2e


def answers(stack: Stack) -> bool:
    try:
        return httpx.get(f"{stack.web_url}/health/live", timeout=5, trust_env=False).is_success
    except httpx.TransportError:
        return False


def test_requests_are_counted_timed_and_kept_through_a_restart_of_the_web_server(stack: Stack) -> None:
    stack.wait_loaded()
    headers = {"Authorization": f"Bearer {stack.api_key}"}
    body = {"model": stack.model, "prompt": "The import statement", "max_tokens": 16, "ignore_eos": True}
    with (
        ControlPlane(stack.web_url, stack.api_key) as llmos,
        httpx.Client(base_url=stack.web_url, headers=headers, timeout=60, trust_env=False) as http,
    ):
        before = llmos.traffic(stack.model, 60)["recent"]["production"]
        for is_streamed in (True, False):
            assert http.post("/v1/completions", json={**body, "stream": is_streamed}).is_success
        assert http.post("/v1/completions", json={**body, "prompt": "word " * 5000}).status_code == 400
        found = llmos.traffic(stack.model, 60)
        production = found["recent"]["production"]
        assert found["is_complete"] and production["requests"] == before["requests"] + 3
        assert production["completion_tokens"] == before["completion_tokens"] + 32
        # Other tests of this installation may have met errors of the server within the hour.
        refused = {"invalid_request": before["errors"].get("invalid_request", 0) + 1}
        assert production["errors"] == {**before["errors"], **refused}
        assert 0 < production["first_token_p50_s"] <= production["end_p95_s"] < 60 < 1e4 * production["tokens_per_s"]
        lines = http.get("/metrics").text.splitlines()
        first_tokens = f'llmos_time_to_first_token_seconds_count{{model="{stack.model}",version="1"}}'
        assert float(next(line for line in lines if line.startswith(first_tokens)).split()[-1]) >= 2, (
            "not streamed, too"
        )

        # What was not flushed yet is flushed as it ends.
        assert http.post("/v1/completions", json=body).is_success
        SupervisorClient(stack.settings).restart("web")
        wait_for(lambda: answers(stack), 60, "its return")
        after = llmos.traffic(stack.model, 60)["recent"]["production"]
        assert after["requests"] == production["requests"] + 1
    shown = stack.llmos("models", "traffic", stack.model)
    assert shown.returncode == 0 and "tokens/s of a request" in shown.stdout, shown.stderr
