"""The registry and its API: numbers, digests, edits by two people, pages; installed versions are taken in."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest
from sqlalchemy import select

from control_plane import create_app
from control_plane.artifacts import ArtifactStore
from control_plane.auth.services import create_key
from control_plane.auth.tables import AuditEvent
from control_plane.client import ApiError, ControlPlane
from control_plane.errors import BadRequest, Conflict
from control_plane.extensions import db
from control_plane.registry import services, serving_state
from control_plane.registry.serving_state import LOADED, ModelState, ServingState
from control_plane.triton_fake import FakeTriton
from triton_backend.version_folder import seal

pytestmark = pytest.mark.unit


@pytest.fixture
def app(settings):
    app = create_app(settings, FakeTriton({}))
    with app.app_context():
        db.create_all()
        yield app


@pytest.fixture
def llmos(app):
    return ControlPlane("http://llmos", create_key("o", "operator"), transport=httpx.WSGITransport(app))


def sealed(folder: Path, salt: str, passed: bool | None = True) -> Path:
    folder.mkdir(parents=True)
    (folder / "model.json").write_text(json.dumps({"model": {"architecture": "Tiny", "precision": "fp32"}, "s": salt}))
    if passed is not None:
        summary = {"passed": passed, "num_tokens_compared": 64, "max_logit_difference": 1e-5}
        (folder / "certificate.json").write_text(json.dumps({"summary": summary}))
    seal(folder, {"checkpoint": salt}, {})
    return folder


def test_versions_count_up_and_the_same_folder_is_the_same_version(app, tmp_path):
    first = services.register("chat", sealed(tmp_path / "a", "a"), job_id="j1")
    second = services.register("chat", sealed(tmp_path / "b", "b", passed=False))
    again = services.register("chat", tmp_path / "a")
    other = services.register("other", tmp_path / "a")
    assert [first.number, second.number, again.id, other.number] == [1, 2, first.id, 1]
    assert (first.passed, second.passed, first.architecture, first.precision) == (True, False, "Tiny", "fp32")
    assert first.source == {"checkpoint": "a"}
    actions = db.session.execute(select(AuditEvent.action, AuditEvent.object_id).order_by(AuditEvent.id)).all()
    assert [tuple(row) for row in actions] == [
        ("model.create", "chat"),
        ("version.create", "chat/1"),
        ("version.create", "chat/2"),
        ("model.create", "other"),
        ("version.create", "other/1"),
    ]


@pytest.mark.parametrize("name", ["..", "a/b", "%2e", "a\0", "x" * 300, "сhat", "Chat", ""])
def test_a_bad_name_registers_nothing(app, tmp_path, name):
    with pytest.raises(BadRequest, match="is not allowed"):
        services.register(name, sealed(tmp_path / "a", "a"))
    assert services.find_models(None, None, 10) == []


def test_installed_versions_are_stored_and_registered_once_under_their_number(app, settings, tmp_path):
    sealed(settings.model_repository / "starter" / "3", "s")
    (settings.model_repository / "starter" / "config.pbtxt").write_text("")
    store = ArtifactStore(str(tmp_path / "store"))
    (adopted,) = services.adopt_installed(settings, store)
    assert (adopted.model.name, adopted.number) == ("starter", 3)
    assert store.digests() == [adopted.digest]
    assert services.adopt_installed(settings, store) == []
    assert services.register("starter", sealed(tmp_path / "b", "b")).number == 4


def test_a_damaged_installed_version_is_left_out(app, settings, tmp_path):
    folder = sealed(settings.model_repository / "starter" / "3", "s")
    (folder.parent / "config.pbtxt").write_text("")
    (folder / "model.json").write_text("changed")
    assert services.adopt_installed(settings, ArtifactStore(str(tmp_path / "store"))) == []
    assert services.find_models(None, None, 10) == []


def test_an_installed_version_whose_number_is_taken_is_left_out(app, settings, tmp_path):
    services.register("starter", sealed(tmp_path / "published", "p"))
    sealed(settings.model_repository / "starter" / "1", "s")
    (settings.model_repository / "starter" / "config.pbtxt").write_text("")
    assert services.adopt_installed(settings, ArtifactStore(str(tmp_path / "store"))) == []
    assert [version.number for version in services.find_versions("starter", None, 10)] == [1]
    with pytest.raises(Conflict, match="has another version 1"):
        services.register("starter", settings.model_repository / "starter" / "1", number=1)


def test_the_api_shows_models_versions_proofs_and_what_is_served(app, llmos, settings, tmp_path):
    for salt in "ab":
        services.register("chat", sealed(tmp_path / salt, salt))
    serving_state.write(settings, ServingState({"chat": ModelState(1, LOADED, 0.0)}, True, 0.0))
    (model,) = llmos.models()
    assert (model["name"], model["num_versions"], model["newest"]["version"]) == ("chat", 2, 2)
    versions = llmos.versions("chat")
    assert [version["version"] for version in versions] == [2, 1]
    assert [version["serving"] and version["serving"]["state"] for version in versions] == [None, "Loaded"]
    assert llmos.version("chat", 1) == versions[1]
    assert versions[0]["certificate"]["num_tokens_compared"] == 64
    assert llmos.models(prefix="ch")[0]["name"] == "chat"
    assert llmos.models(prefix="c%") == []


def test_two_people_cannot_undo_each_others_edit(app, llmos, tmp_path):
    services.register("chat", sealed(tmp_path / "a", "a"))
    read = llmos.model("chat")
    assert llmos.describe_model("chat", "first", read["revision"])["revision"] == 2
    with pytest.raises(ApiError, match="read it again") as refused:
        llmos.describe_model("chat", "second", read["revision"])
    assert (refused.value.status, llmos.model("chat")["description"]) == (412, "first")
    assert llmos.describe_model("chat", "third")["description"] == "third"


@pytest.mark.parametrize("body", [b"{}", b'{"description": 1}', b'{"name": "x"}', b'{"description": "' + b"x" * 20000])
def test_a_bad_edit_is_refused(app, tmp_path, body):
    services.register("chat", sealed(tmp_path / "a", "a"))
    client = app.test_client()
    client.environ_base["HTTP_AUTHORIZATION"] = f"Bearer {create_key('o', 'operator')}"
    assert client.patch("/api/v1/models/chat", data=body).status_code == 400
    bad_tag = client.patch("/api/v1/models/chat", json={"description": "x"}, headers={"If-Match": '"x"'})
    assert bad_tag.status_code == 400
    client.environ_base["HTTP_AUTHORIZATION"] = f"Bearer {create_key('d', 'developer')}"
    assert client.patch("/api/v1/models/chat", json={"description": "x"}).status_code == 403


@pytest.mark.parametrize("name", ["nothing", "..", "%2e%2e", "%00", "x" * 300, "' OR 1=1 --", "a%2fb"])
def test_a_model_that_is_not_there_is_404(app, llmos, name):
    client = app.test_client()
    client.environ_base["HTTP_AUTHORIZATION"] = f"Bearer {create_key('v', 'viewer')}"
    for path in (f"/api/v1/models/{name}", f"/api/v1/models/{name}/versions", f"/api/v1/models/{name}/versions/1"):
        assert client.get(path).status_code == 404
    with pytest.raises(ApiError) as refused:
        llmos.versions(name)
    assert refused.value.status == 404


def test_pages_of_many_models_and_versions_hold_each_once(app, llmos, tmp_path):
    for number in range(5):
        services.register("chat", sealed(tmp_path / f"c{number}", f"c{number}"))
        services.register(f"m{number}", tmp_path / f"c{number}")
    client = app.test_client()
    client.environ_base["HTTP_AUTHORIZATION"] = f"Bearer {create_key('v', 'viewer')}"
    seen, after = [], ""
    while True:
        page = client.get(f"/api/v1/models?limit=2{after}").json
        seen += [model["name"] for model in page["data"]]
        if not page["has_more"]:
            break
        after = f"&after={seen[-1]}"
    assert seen == ["chat", "m0", "m1", "m2", "m3", "m4"]
    assert [row["version"] for row in client.get("/api/v1/models/chat/versions?limit=3&before=5").json["data"]] == [
        4,
        3,
        2,
    ]
