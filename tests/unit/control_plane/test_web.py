"""Health endpoints and the index page, over a scripted Triton."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from control_plane import errors
from control_plane.auth.key_params import KeyParams
from control_plane.auth.services import make_key
from control_plane.extensions import db
from control_plane.registry import serving_state
from control_plane.registry.places import Place
from control_plane.registry.tables import Alias
from control_plane.web.services import Cached

pytestmark = pytest.mark.unit


def test_live_answers_even_without_triton(client, triton):
    triton.is_running = False
    assert client.get("/health/live").status_code == 200
    assert client.get("/health").get_json() == {"status": "live"}


def test_ready_needs_every_production_version_to_answer_a_probe(client):
    response = client.get("/health/ready")
    assert response.status_code == 200
    model = response.get_json()["models"]["starter"]
    assert (model["version"], model["state"], model["reason"], model["latency_ms"]) == (3, "ready", None, 2.0)


def test_ready_says_why_a_model_is_not(client, triton):
    triton.probe_error = errors.ServingError("Stub process 'starter_0_0' is not healthy.")
    response = client.get("/health/ready")
    assert response.status_code == 503
    model = response.get_json()["models"]["starter"]
    assert (model["state"], model["reason"]) == ("failed", "serving_error")
    assert model["message"] == "Stub process 'starter_0_0' is not healthy."


def test_model_that_is_not_loaded_yet_is_loading(client, triton):
    triton.unload("starter")
    model = client.get("/health/ready").get_json()["models"]["starter"]
    assert model["state"] == "loading"


def test_model_that_failed_to_load_gives_the_reconcilers_message(client, triton, settings):
    triton.unload("starter")
    state = serving_state.ModelState(3, serving_state.FAILED_TO_LOAD, 0.0, "ModelLoadFailed", "model.onnx.data differs")
    serving_state.write(settings, serving_state.ServingState({}, True, 0.0, {Place("starter", 3): state}))
    model = client.get("/health/ready").get_json()["models"]["starter"]
    assert (model["state"], model["reason"]) == ("failed", "ModelLoadFailed")
    assert model["message"] == "model.onnx.data differs"


SECRET = "/srv/models/starter/3/model.onnx.data differs"


@pytest.fixture
def failed(triton, settings):
    triton.unload("starter")
    state = serving_state.ModelState(3, serving_state.FAILED_TO_LOAD, 0.0, "ModelLoadFailed", SECRET)
    serving_state.write(settings, serving_state.ServingState({}, True, 0.0, {Place("starter", 3): state}))


@pytest.mark.parametrize("scopes", [None, [], ["generate"]], ids=["stranger", "bad-key", "generate-only"])
def test_whoever_may_not_read_sees_the_state_and_one_word_but_no_message(app, failed, triton, scopes):
    stranger = app.test_client()
    if scopes is not None:
        with app.app_context():
            key = make_key(KeyParams("k", "developer", scopes=scopes))[1] if scopes else "llmos_0_0"
        stranger.environ_base["HTTP_AUTHORIZATION"] = f"Bearer {key}"
    model = stranger.get("/health/ready").get_json()["models"]["starter"]
    assert (model["state"], model["reason"], model["message"]) == ("failed", "ModelLoadFailed", None)
    triton.is_running = False
    for path in ("/", "/status"):
        text = stranger.get(path).get_data(as_text=True)
        assert "ModelLoadFailed" in text or "triton_unavailable" in text
        assert SECRET not in text and "see the log" not in text and "127.0.0.1:1" not in text


def test_whoever_may_read_sees_the_message(client, failed, sign_in):
    browser, _ = sign_in(role="viewer")
    for reader in (client, browser):
        assert reader.get("/health/ready").get_json()["models"]["starter"]["message"] == SECRET
        for path in ("/", "/status"):
            assert SECRET in reader.get(path).get_data(as_text=True)


def test_not_ready_without_any_production_version(app, client):
    with app.app_context():
        db.session.query(Alias).delete()
        db.session.commit()
    response = client.get("/health/ready")
    assert response.status_code == 503
    assert response.get_json()["reason"] == "no model has a production version"


def test_not_ready_without_triton(client, triton):
    triton.is_running = False
    response = client.get("/health/ready")
    assert response.status_code == 503
    assert "does not answer" in response.get_json()["models"]["starter"]["message"]


def test_many_readers_cost_one_probe(client, triton):
    for _ in range(5):
        client.get("/health/ready")
    assert triton.num_probes == 1


def test_cached_value_is_computed_again_when_it_is_old():
    values = iter(range(10))
    cached = Cached(ttl_s=0.0, compute=lambda: next(values))
    assert (cached.get(), cached.get()) == (0, 1)


class _Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def test_index_says_what_is_running(client):
    text = client.get("/").get_data(as_text=True)
    for expected in ("starter", "version 3", "LlamaForCausalLM", "fp32, 2.5 MB", "passed: 768 tokens", "1.3e-05"):
        assert expected in text
    assert "http://localhost/v1/completions" in text


def test_index_says_which_process_is_down(client):
    text = client.get("/").get_data(as_text=True)
    assert re.search(r"Worker</strong>.*?nobody has asked it yet.*?failed", text, re.DOTALL)
    assert re.search(r"Redis</strong>.*?it does not answer; see the log.*?failed", text, re.DOTALL)
    assert "127.0.0.1:1" not in text


def test_page_uses_nothing_from_outside_and_no_inline_code(client):
    response = client.get("/")
    assert "default-src 'self'" in response.headers["Content-Security-Policy"]
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    for tag, attributes in _Page(response.get_data(as_text=True)).tags:
        assert not any(name.startswith("on") or name == "style" for name in attributes), (tag, attributes)
        for name in ("src", "href"):
            if name in attributes:
                assert attributes[name].startswith("/"), (tag, attributes)
                assert client.get(attributes[name]).status_code in (200, 503)
        assert tag != "style" and (tag != "script" or "src" in attributes)


def test_headings_of_the_page_skip_no_level(client):
    page = _Page(client.get("/").get_data(as_text=True))
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


def test_paths_are_shown_only_on_loopback(app, client, settings):
    assert str(settings.logs_dir) in client.get("/").get_data(as_text=True)
    object.__setattr__(settings, "host", "0.0.0.0")
    assert str(settings.logs_dir) not in client.get("/").get_data(as_text=True)


def test_reasons_are_escaped(client, triton):
    triton.probe_error = errors.ServingError("<script>alert(1)</script>")
    assert "<script>alert" not in client.get("/status").get_data(as_text=True)
