"""An application with a Triton that needs no server, and a database in memory."""

from __future__ import annotations

import json

import httpx
import pytest

from control_plane import create_app
from control_plane.auth import hashes
from control_plane.auth.hashes import Passwords
from control_plane.auth.services import create_key
from control_plane.client import ControlPlane
from control_plane.extensions import db
from control_plane.registry.places import Place
from control_plane.settings import Settings
from control_plane.triton_fake import FakeTriton, word_by_word
from tests.contract import watched
from tests.served import say_loaded, serve

PASSWORD = "correct horse battery"


@pytest.fixture(autouse=True)
def every_answer_is_as_documented():
    with watched():
        yield


@pytest.fixture
def settings(tmp_path) -> Settings:
    return Settings.from_environment(
        {
            "LLMOS_HOME": str(tmp_path / "home"),
            "LLMOS_MODEL_REPOSITORY": str(tmp_path / "models"),
            "LLMOS_DATABASE_URL": "sqlite://",
            # Nothing listens there: whatever needs Redis must fail fast and say so.
            "LLMOS_REDIS_URL": "redis://127.0.0.1:1/0",
            "LLMOS_REQUEST_LIMIT_BYTES": "65536",
        }
    )


@pytest.fixture
def triton(settings) -> FakeTriton:
    version = settings.model_repository / "starter" / "3"
    version.mkdir(parents=True)
    (version.parent / "config.pbtxt").write_text("")
    files = {"model.onnx": {"size_bytes": 2_500_000}}
    (version / "manifest.json").write_text(json.dumps({"format": 1, "files": files}))
    model = {"architecture": "LlamaForCausalLM", "precision": "fp32"}
    (version / "model.json").write_text(json.dumps({"model": model, "engine": {"max_model_len": 512}}))
    summary = {"passed": True, "num_tokens_compared": 768, "max_logit_difference": 1.3e-5}
    (version / "certificate.json").write_text(json.dumps({"passed": True, "summary": summary}))
    return FakeTriton({"starter": word_by_word}, {"starter": [3]})


@pytest.fixture
def app(settings, triton):
    app = create_app(settings, triton)
    with app.app_context():
        db.create_all()
        serve("starter", 3)
    say_loaded(settings, Place("starter", 3))
    return app


@pytest.fixture
def api_key(app) -> str:
    with app.app_context():
        return create_key("test", "developer")


@pytest.fixture
def client(app, api_key):
    client = app.test_client()
    client.environ_base["HTTP_AUTHORIZATION"] = f"Bearer {api_key}"
    return client


@pytest.fixture(autouse=True)
def quick_hashes(monkeypatch):
    monkeypatch.setattr(hashes, "MEMORY_KIB", 64)
    monkeypatch.setattr(hashes, "TIME_COST", 1)
    monkeypatch.setattr(hashes, "NOBODY", Passwords().hash("thrown away at once"))


@pytest.fixture
def admin(app):
    with app.app_context():
        key = create_key("admin", "admin")
    return ControlPlane("http://llmos", key, transport=httpx.WSGITransport(app))


@pytest.fixture
def sign_in(app, admin):
    """A browser of somebody who is signed in, and the header of what it changes."""

    def sign_in(name: str = "ada", role: str = "admin"):
        if name not in [user["name"] for user in admin.users()]:
            admin.create_user(name, PASSWORD, role)
        browser = app.test_client()
        answer = browser.post("/api/v1/session", json={"name": name, "password": PASSWORD})
        assert answer.status_code == 201, answer.text
        return browser, {"X-CSRF-Token": answer.json["csrf_token"]}

    return sign_in
