"""Rate limits on a real Redis: per key and user, tokens, failed logins, and a Redis that is away."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx
import openai
import pytest
import redis

from control_plane import create_app, upgrade_database
from control_plane.auth import hashes
from control_plane.auth.key_params import KeyParams
from control_plane.auth.limits import FAILED_LOGINS_PER_MINUTE
from control_plane.auth.services import make_key
from control_plane.auth.users import create_user
from control_plane.registry.places import Place
from control_plane.triton_fake import FakeTriton, word_by_word
from tests.served import say_loaded, serve

from .processes import free_port

pytestmark = pytest.mark.integration

PASSWORD = "correct horse battery"
COMPLETION = {"model": "starter", "prompt": "a b", "max_tokens": 3}
"""Five tokens: two of the prompt, three of the answer."""


@pytest.fixture
def build(settings, monkeypatch):
    monkeypatch.setattr(hashes, "MEMORY_KIB", 64)
    monkeypatch.setattr(hashes, "TIME_COST", 1)
    upgrade_database(settings)
    with create_app(settings, FakeTriton({})).app_context():
        serve("starter")
    say_loaded(settings, Place("starter", 1))
    return lambda **changes: create_app(replace(settings, **changes), FakeTriton({"starter": word_by_word}))


@pytest.fixture
def app(build, redis_process):
    return build()


def client_of(app, role: str = "developer", **limits):
    with app.app_context():
        key = make_key(KeyParams(role, role, **limits))[1]
    client = app.test_client()
    client.environ_base["HTTP_AUTHORIZATION"] = f"Bearer {key}"
    return client


def statuses(call, times: int) -> list[int]:
    found = []
    for _ in range(times):
        # A server closes every answer when it is sent, which is when its tokens are counted.
        with call() as answer:
            answer.get_data()
            found.append(answer.status_code)
    return found


def end_minute(settings) -> None:
    with redis.Redis.from_url(settings.redis_url) as client:
        keys = client.keys("LIMITS*")
        assert keys and all(0 < client.ttl(key) <= 60 for key in keys)
        client.delete(*keys)


def test_a_key_has_its_requests_over_all_routes_and_no_more(app, settings):
    client, other = client_of(app, requests_per_minute=3), client_of(app)
    assert statuses(lambda: client.get("/api/v1/jobs"), 2) == [200, 200]
    assert client.post("/v1/completions", json=COMPLETION).status_code == 200
    problem = client.get("/api/v1/jobs")
    assert (problem.status_code, problem.mimetype) == (429, "application/problem+json")
    assert (problem.json["code"], problem.json["title"]) == ("rate_limit_exceeded", "Too Many Requests")
    assert "3 requests of this minute; try again in" in problem.json["detail"]
    assert 1 <= int(problem.headers["Retry-After"]) <= 60
    error = client.post("/v1/completions", json=COMPLETION)
    assert (error.status_code, error.json["error"]["code"]) == (429, "rate_limit_exceeded")
    assert error.json["error"]["type"] == "rate_limit_error"
    assert 1 <= int(error.headers["Retry-After"]) <= 60
    assert other.get("/api/v1/jobs").status_code == 200
    end_minute(settings)
    assert client.get("/api/v1/jobs").status_code == 200


def test_what_is_public_costs_no_requests(app):
    """The index page asks for its state again and again, with the key that somebody typed into it."""
    client = client_of(app, requests_per_minute=2)
    for path in ("/", "/status", "/health/live", "/status"):
        assert client.get(path).status_code == 200
    assert statuses(lambda: client.get("/api/v1/jobs"), 3) == [200, 200, 429]


def test_openais_client_sees_its_own_exception(app):
    key = client_of(app, requests_per_minute=1).environ_base["HTTP_AUTHORIZATION"].removeprefix("Bearer ")
    http = httpx.Client(transport=httpx.WSGITransport(app), base_url="http://llmos/v1")
    client = openai.OpenAI(api_key=key, base_url="http://llmos/v1", http_client=http, max_retries=0)
    client.models.list()
    with pytest.raises(openai.RateLimitError, match="try again in"):
        client.models.list()


def test_without_a_limit_of_their_own_keys_and_users_have_the_installations(build, redis_process):
    app = build(requests_per_minute=2)
    with app.app_context():
        create_user("ada", PASSWORD, "viewer")
    user = app.test_client()
    assert user.post("/api/v1/session", json={"name": "ada", "password": PASSWORD}).status_code == 201
    for client in (client_of(app), client_of(app), user):
        assert statuses(lambda client=client: client.get("/api/v1/jobs"), 3) == [200, 200, 429]
    assert statuses(lambda: client_of(app, requests_per_minute=5).get("/api/v1/jobs"), 3) == [200] * 3
    stranger = app.test_client()
    assert statuses(lambda: stranger.get("/api/v1/jobs"), 5) == [401] * 5
    assert statuses(lambda: stranger.get("/health/live"), 5) == [200] * 5


@pytest.mark.parametrize("body", [COMPLETION, {**COMPLETION, "stream": True}])
def test_tokens_of_prompts_and_answers_are_counted(app, settings, body):
    client, other = client_of(app, tokens_per_minute=10), client_of(app)
    assert statuses(lambda: client.post("/v1/completions", json=body), 3) == [200, 200, 429]
    refused = client.post("/v1/completions", json=body)
    assert "10 tokens of this minute" in refused.json["error"]["message"]
    assert 1 <= int(refused.headers["Retry-After"]) <= 60
    assert client.get("/v1/models").status_code == 200
    assert statuses(lambda: other.post("/v1/completions", json=body), 4) == [200] * 4
    end_minute(settings)
    assert client.post("/v1/completions", json=body).status_code == 200


def test_a_stream_that_is_left_costs_what_it_gave(app):
    client = client_of(app, tokens_per_minute=100)
    with client.post("/v1/completions", json={**COMPLETION, "max_tokens": 400, "stream": True}) as answer:
        parts = iter(answer.response)
        for _ in range(120):
            next(parts)
    assert client.post("/v1/completions", json=COMPLETION).status_code == 429


def test_an_answer_that_fails_costs_what_it_gave(app):
    from control_plane.errors import ServingError

    def breaks(call):
        yield from list(word_by_word(call))[:1]
        raise ServingError("the model's process is gone")

    app.extensions["triton"].models["starter"] = breaks
    client = client_of(app, tokens_per_minute=5)
    assert statuses(lambda: client.post("/v1/completions", json=COMPLETION), 2) == [502, 429]


def log_in(app, password: str, address: str = "192.0.2.1"):
    body = {"name": "ada", "password": password}
    return app.test_client().post("/api/v1/session", json=body, environ_base={"REMOTE_ADDR": address})


@pytest.fixture
def ada(app):
    with app.app_context():
        create_user("ada", PASSWORD, "viewer")


def test_failed_logins_are_limited_per_address(app, ada, settings):
    assert statuses(lambda: log_in(app, "wrong password"), FAILED_LOGINS_PER_MINUTE) == [401] * 10
    refused = log_in(app, PASSWORD)
    assert (refused.status_code, refused.json["code"]) == (429, "rate_limit_exceeded")
    assert 1 <= int(refused.headers["Retry-After"]) <= 60
    assert log_in(app, PASSWORD, "192.0.2.2").status_code == 201
    end_minute(settings)
    assert log_in(app, PASSWORD).status_code == 201


def test_logins_that_succeed_are_not_counted(app, ada):
    assert statuses(lambda: log_in(app, PASSWORD), 2 * FAILED_LOGINS_PER_MINUTE) == [201] * 20
    assert log_in(app, "wrong password").status_code == 401


def test_a_network_of_ipv6_counts_as_one_address(app, ada):
    addresses = [f"2001:db8::{number:x}" for number in range(FAILED_LOGINS_PER_MINUTE + 1)]
    found = [log_in(app, "wrong password", address).status_code for address in addresses]
    assert found == [401] * 10 + [429]
    assert log_in(app, PASSWORD, "2001:db8:0:1::1").status_code == 201


def test_addresses_of_ipv4_are_told_apart_on_a_socket_of_ipv6(app, ada):
    attempts = FAILED_LOGINS_PER_MINUTE + 1
    assert statuses(lambda: log_in(app, "wrong password", "::ffff:192.0.2.1"), attempts) == [401] * 10 + [429]
    assert log_in(app, PASSWORD, "::ffff:192.0.2.2").status_code == 201


@pytest.mark.parametrize(("num_proxies", "last"), [(0, 429), (1, 401)])
def test_an_address_is_what_a_trusted_proxy_says_and_nobody_else(build, redis_process, num_proxies, last):
    app = build(num_proxies=num_proxies)
    body = {"name": "ada", "password": "wrong password"}
    found = [
        app.test_client().post("/api/v1/session", json=body, headers={"X-Forwarded-For": f"198.51.100.{number}"})
        for number in range(FAILED_LOGINS_PER_MINUTE + 1)
    ]
    assert [answer.status_code for answer in found] == [401] * 10 + [last]


def test_many_guesses_at_once_are_no_more_than_one_after_the_other(app, ada):
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda _: log_in(app, "wrong password").status_code, range(32)))
    assert (found.count(401), found.count(429)) == (10, 22)


def test_guessing_ones_current_password_counts_as_well(app, ada):
    browser = app.test_client()
    csrf = browser.post("/api/v1/session", json={"name": "ada", "password": PASSWORD}).json["csrf_token"]
    body = {"current_password": "wrong password", "password": PASSWORD + "!"}
    found = statuses(lambda: browser.patch("/api/v1/session", json=body, headers={"X-CSRF-Token": csrf}), 11)
    assert found == [401] * 10 + [429]


def test_while_redis_is_away_everything_is_allowed_and_the_log_says_so(app, ada, redis_process, caplog, capsys):
    client = client_of(app, requests_per_minute=2, tokens_per_minute=5)
    assert statuses(lambda: client.post("/v1/completions", json=COMPLETION), 2) == [200, 429]
    redis_process.stop()
    started_at = time.monotonic()
    assert statuses(lambda: client.post("/v1/completions", json=COMPLETION), 5) == [200] * 5
    assert statuses(lambda: log_in(app, "wrong password"), 12) == [401] * 12
    assert log_in(app, PASSWORD).status_code == 201
    assert time.monotonic() - started_at < 10
    warnings = [record for record in caplog.records if record.name == "flask-limiter"]
    assert {(record.levelname, record.exc_info) for record in warnings} == {("WARNING", None)}
    assert all("rate_limits_not_counted" in record.getMessage() for record in warnings)
    assert "rate_limits_not_counted" in capsys.readouterr().out
    redis_process.start()
    assert statuses(lambda: client.post("/v1/completions", json=COMPLETION), 2) == [200, 429]


def test_a_redis_that_never_answers_delays_but_does_not_stop(build):
    port = free_port()
    with socket.create_server(("127.0.0.1", port)) as silent:
        accepted: list[socket.socket] = []

        def accept() -> None:
            while True:
                try:
                    accepted.append(silent.accept()[0])
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        client = client_of(build(redis_url_override=f"redis://127.0.0.1:{port}/0"))
        started_at = time.monotonic()
        assert client.get("/api/v1/jobs").status_code == 200
        assert time.monotonic() - started_at < 3
        for connection in accepted:
            connection.close()
