"""What the gateway answered is counted by version and outcome, and shown, with a Redis that is away all the time."""

from __future__ import annotations

import threading
import time

import pytest
from typer.testing import CliRunner

from control_plane import cli, errors
from control_plane.commands import traffic as command
from control_plane.extensions import db
from control_plane.registry.places import Place
from control_plane.registry.tables import CANARY, Alias, Model, Version
from control_plane.traffic.prometheus import METRICS
from control_plane.triton_fake import word_by_word
from tests.unit.control_plane.conftest import say_loaded
from tests.unit.control_plane.test_gateway import complete, error_of
from triton_backend.protocol import GenerateResponse

pytestmark = pytest.mark.unit


@pytest.fixture
def canary(app, settings, triton) -> None:
    """Version 4 of the starter, with half of the requests."""
    triton.models["starter.canary"] = word_by_word
    triton.versions["starter.canary"] = [4]
    with app.app_context():
        model = db.session.query(Model).one()
        version = Version(model=model, number=4, digest="1" * 64, passed=True, created_by="test")
        db.session.add(Alias(model=model, name=CANARY, version=version, weight=50.0))
        db.session.commit()
    say_loaded(settings, Place("starter", 3), Place("starter.canary", 4))


def traffic(client, **query) -> dict:
    answer = client.get("/api/v1/models/starter/traffic", query_string=query)
    assert answer.status_code == 200, answer.get_json()
    return answer.get_json()


def test_production_and_canary_are_counted_apart(client, canary):
    for _ in range(20):
        complete(client)
    found = traffic(client)
    for window in (found["recent"], found["since_canary"]):
        assert window["production"]["requests"] + window["canary"]["requests"] == 20
        assert 8 <= window["canary"]["requests"] <= 12
        assert window["canary"]["completion_tokens"] == 3 * window["canary"]["requests"]
        assert window["canary"]["prompt_tokens"] == 2 * window["canary"]["requests"]
        assert window["canary"]["error_share"] == 0 and window["canary"]["tokens_per_s"] > 0
    assert not found["is_complete"], "Redis is away"


def test_a_stream_is_timed_to_its_first_token(client, triton):
    triton.models["starter"] = lambda call: word_by_word(call, pause_s=0.06)
    complete(client, stream=True).get_data()
    production = traffic(client)["recent"]["production"]
    assert 0.04 <= production["first_token_p50_s"] <= production["end_p50_s"]
    assert production["end_p50_s"] >= 0.16, "three tokens, 0.06 s apart"


def test_a_whole_answer_is_timed_by_what_the_engine_says(client, triton):
    def script(call):
        for response in word_by_word(call):
            response.metrics.update(queue_s=0.5, prefill_s=0.5)
            yield response

    triton.models["starter"] = script
    complete(client)
    assert 0.64 <= traffic(client)["recent"]["production"]["first_token_p50_s"] <= 1.28


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_is_counted_under_its_code(client, triton, stream):
    def script(call):
        yield from list(word_by_word(call))[:1] if call.stream else ()
        raise errors.ServingError("the process is gone")

    triton.models["starter"] = script
    complete(client, stream=stream).get_data()
    production = traffic(client)["recent"]["production"]
    assert (production["errors"], production["error_share"]) == ({"serving_error": 1}, 1.0)
    assert production["completion_tokens"] == int(stream) and production["end_p50_s"] is None


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_breaks_off_is_an_error_of_the_version(client, triton, stream):
    triton.models["starter"] = lambda call: [GenerateResponse(call.request_id, finished=True)]
    complete(client, stream=stream).get_data()
    production = traffic(client)["recent"]["production"]
    assert (production["errors"], production["error_share"]) == ({"serving_error": 1}, 1.0)


def test_a_client_that_leaves_is_counted_and_no_error(client):
    answer = complete(client, stream=True, max_tokens=50)
    next(answer.response)
    answer.close()
    production = traffic(client)["recent"]["production"]
    assert (production["errors"], production["error_share"]) == ({"client_gone": 1}, 0.0)


def test_a_model_that_does_not_exist_makes_no_series(client, app):
    assert error_of(complete(client, model="nobody"))["code"] == "not_found"
    assert error_of(complete(client, model="starter@9"))["code"] == "not_found"
    assert app.extensions["traffic"].totals() == {}


@pytest.mark.parametrize("minutes", ["0", "1441", "x", "-1"])
def test_a_bad_window_is_refused(client, minutes):
    answer = client.get(f"/api/v1/models/starter/traffic?minutes={minutes}")
    assert answer.status_code == 400 and "minutes has value" in answer.get_json()["detail"]
    assert client.get("/api/v1/models/nobody/traffic").status_code == 404


def test_prometheus_reads_counters_and_histograms(client, app):
    complete(client)
    complete(client, stream=True).get_data()
    answer = client.get("/metrics")
    lines = answer.get_data(as_text=True).splitlines()
    assert answer.mimetype == "text/plain"
    assert 'llmos_requests_total{model="starter",outcome="ok",version="3"} 2.0' in lines
    assert 'llmos_completion_tokens_total{model="starter",version="3"} 6.0' in lines
    assert 'llmos_request_seconds_bucket{le="+Inf",model="starter",version="3"} 2.0' in lines
    assert [name for name in METRICS if not any(f" {name} " in line or line.startswith(name) for line in lines)] == []
    assert app.test_client().get("/metrics").status_code == 401


def test_a_redis_that_is_away_costs_a_request_nothing(client, app):
    recorder = app.extensions["traffic"]
    for _ in range(3):
        complete(client)
        assert recorder.flush() is False
    started_at = time.monotonic()
    complete(client)
    assert time.monotonic() - started_at < 1.0
    assert traffic(client)["recent"]["production"]["requests"] == 4


def test_a_process_that_can_start_no_thread_still_answers_and_counts(client, app, monkeypatch):
    def start(self) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Timer, "start", start)
    for _ in range(2):
        assert complete(client).status_code == 200
    assert traffic(client)["recent"]["production"]["requests"] == 2


def test_the_command_shows_both_sides_and_the_difference(client, canary, monkeypatch):
    for _ in range(10):
        complete(client)
    found = traffic(client)
    found["recent"]["production"] |= {"first_token_p95_s": 0.2, "error_share": 0.0}
    found["recent"]["canary"] |= {"first_token_p95_s": 0.3, "error_share": 0.025, "errors": {"timeout": 1}}

    class Llmos:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def traffic(self, name, minutes):
            assert (name, minutes) == ("starter", 7)
            return found

    monkeypatch.setattr(command, "connected", Llmos)
    monkeypatch.setenv("COLUMNS", "120")
    shown = CliRunner().invoke(cli.app, ["models", "traffic", "starter", "--minutes", "7"])
    assert shown.exit_code == 0, shown.output
    for text in ("production 3", "canary 4", "+50 %", "+2.50 points", "errors: timeout", "since the canary began"):
        assert text in shown.output
