"""The web application in the server that really runs it: streaming, disconnects, bodies that are too large."""

from __future__ import annotations

import time
from collections.abc import Iterator

import httpx
import pytest

from control_plane import create_app
from control_plane.auth.services import create_key
from control_plane.triton_fake import FakeTriton

from .processes import wait_for, web_server

pytestmark = pytest.mark.integration


@pytest.fixture
def web(environment, settings, tmp_path) -> Iterator[httpx.Client]:
    with web_server(environment, settings.web_port, tmp_path / "web.log") as url:
        with create_app(settings, FakeTriton({})).app_context():
            key = create_key("test", "developer")
        with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=30) as client:
            yield client


def stream(web: httpx.Client, **body):
    body = {"model": "starter", "prompt": "a", "max_tokens": 100, "stream": True, **body}
    return web.stream("POST", "/v1/completions", json=body)


def test_chunks_arrive_one_by_one(web):
    arrivals = []
    with stream(web, max_tokens=5) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                arrivals.append(time.monotonic())
    assert len(arrivals) == 5
    assert arrivals[-1] - arrivals[0] > 0.3


def test_client_that_hangs_up_mid_stream_cancels_within_100_ms_of_the_next_chunk(web, settings):
    with stream(web) as response:
        for number, _ in enumerate(response.iter_lines()):
            if number == 4:
                break
    hung_up_at = time.time()
    cancelled = settings.home / "cancelled"
    wait_for(cancelled.exists, 3, "the cancellation")
    # The next word is up to 100 ms away.
    assert float(cancelled.read_text().split()[0]) - hung_up_at < 0.3


def test_client_that_hangs_up_before_a_whole_answer_cancels_it(web, settings):
    with pytest.raises(httpx.ReadTimeout):
        body = {"model": "starter", "prompt": "a", "max_tokens": 3, "n": 1, "stream": False}
        web.post("/v1/completions", json={**body, "prompt": ["a"] * 8}, timeout=0.2)
    wait_for((settings.home / "cancelled").exists, 3, "the cancellation")


def test_connection_carries_many_requests(web):
    for _ in range(20):
        assert web.post("/v1/completions", json={"model": "quick", "prompt": "a"}).status_code == 200
        with stream(web, model="quick") as response:
            assert response.read().endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("size_bytes", [(1 << 20) + 1, 8 << 20])
def test_body_over_the_limit_is_413_and_the_client_reads_it(web, size_bytes):
    response = web.post("/v1/completions", content=b" " * size_bytes)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"


def test_chunked_body_over_the_limit_is_413_too(web):
    response = web.post("/v1/completions", content=(b" " * 10_000 for _ in range(200)))
    assert response.status_code == 413
