"""The registry and its API: numbers, digests, edits by two people, pages; installed versions are taken in."""

from __future__ import annotations

import pytest
from sqlalchemy import select

from control_plane.auth.services import create_key
from control_plane.auth.tables import AuditEvent
from control_plane.client import ApiError
from control_plane.errors import BadRequest
from control_plane.extensions import db
from control_plane.registry import deployments, services, serving_state
from control_plane.registry.places import Place
from control_plane.registry.serving_state import LOADED, ModelState, ServingState
from tests.unit.control_plane.registry.conftest import sealed

pytestmark = pytest.mark.unit


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


def test_what_was_retired_can_be_published_anew(app, tmp_path):
    folder = sealed(tmp_path / "a", "a")
    assert [services.register("chat", folder).number for _ in range(2)] == [1, 1]
    deployments.retire("chat", 1)
    assert [services.register("chat", folder).number for _ in range(2)] == [2, 2]


@pytest.mark.parametrize("name", ["..", "a/b", "%2e", "a\0", "x" * 300, "сhat", "Chat", ""])
def test_a_bad_name_registers_nothing(app, tmp_path, name):
    with pytest.raises(BadRequest, match="is not allowed"):
        services.register(name, sealed(tmp_path / "a", "a"))
    assert services.find_models(None, None, 10) == []


def test_the_api_shows_models_versions_proofs_and_what_is_served(app, llmos, settings, tmp_path):
    for salt in "ab":
        services.register("chat", sealed(tmp_path / salt, salt))
    deployments.adopt_production("chat", 1)
    serving_state.write(settings, ServingState({}, True, 0.0, {Place("chat", 1): ModelState(1, LOADED, 0.0)}))
    (model,) = llmos.models()
    assert (model["name"], model["num_versions"], model["newest"]["version"]) == ("chat", 2, 2)
    assert (model["serving"]["version"], model["serving"]["state"]) == (1, "Loaded")
    versions = llmos.versions("chat")
    assert [version["version"] for version in versions] == [2, 1]
    assert [version["serving"]["state"] for version in versions] == ["Standby", "Loaded"]
    assert [version["aliases"] for version in versions] == [[], ["production"]]
    assert llmos.version("chat", 1) == versions[1]
    assert versions[0]["certificate"]["num_tokens_compared"] == 64
    assert llmos.models(prefix="ch")[0]["name"] == "chat"
    assert llmos.models(prefix="c%") == []


def test_two_people_cannot_undo_each_others_edit(app, llmos, tmp_path):
    services.register("chat", sealed(tmp_path / "a", "a"))
    read = llmos.model("chat")
    assert llmos.edit_model("chat", read["revision"], description="first")["revision"] == 2
    with pytest.raises(ApiError, match="read it again") as refused:
        llmos.edit_model("chat", read["revision"], description="second")
    assert (refused.value.status, llmos.model("chat")["description"]) == (412, "first")
    assert llmos.edit_model("chat", description="third")["description"] == "third"


@pytest.mark.parametrize(
    "body",
    [
        b"{}",
        b'{"description": 1}',
        b'{"name": "x"}',
        b'{"description": "' + b"x" * 20000,
        b'{"thresholds": {"perplexity.bits": {}}}',
        b'{"thresholds": {"perplexity.bits": {"max": NaN}}}',
        b'{"thresholds": {"no metric": {"max": 1}}}',
    ],
)
def test_a_bad_edit_is_refused(app, tmp_path, body):
    services.register("chat", sealed(tmp_path / "a", "a"))
    client = app.test_client()
    client.environ_base["HTTP_AUTHORIZATION"] = f"Bearer {create_key('o', 'operator')}"
    assert client.patch("/api/v1/models/chat", data=body).status_code == 400
    assert client.patch("/api/v1/models/chat", json={"description": "a\0b"}).status_code == 400
    weak = client.patch("/api/v1/models/chat", json={"description": "x"}, headers={"If-Match": 'W/"9"'})
    assert weak.status_code == 412
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
