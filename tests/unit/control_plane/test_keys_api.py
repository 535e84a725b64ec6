"""API keys over the REST API: who may make, see and revoke them, what they may do, and what is refused."""

from __future__ import annotations

import itertools
import json
import threading
import time
from datetime import timedelta
from urllib.parse import quote

import httpx
import pytest
from sqlalchemy import func, select
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from control_plane.auth import watch
from control_plane.auth.key_params import KeyParams
from control_plane.auth.roles import ROLES, SCOPES, scopes_of
from control_plane.auth.services import create_key, make_key
from control_plane.auth.tables import ApiKey, AuditEvent
from control_plane.client import ApiError, ControlPlane
from control_plane.extensions import db, now
from control_plane.jobs.tables import Job
from control_plane.registry.places import Place
from control_plane.registry.services import register
from control_plane.triton_fake import word_by_word
from tests.served import say_loaded, serve
from tests.unit.control_plane.registry.conftest import sealed

pytestmark = pytest.mark.unit

HOSTILE = ["..", "../keys", "%2e%2e", "a/b", "\0", "x" * 300, "ѕelf", "' OR 1=1 --", '"; DROP TABLE api_keys; --', "🙂"]


@pytest.fixture
def plain_text(app):
    def plain_text(role: str = "admin", **limits) -> str:
        with app.app_context():
            return make_key(KeyParams(role, role, **limits))[1]

    return plain_text


@pytest.fixture
def connect(app, plain_text):
    return lambda *args, **limits: ControlPlane(
        "http://llmos", plain_text(*args, **limits), transport=httpx.WSGITransport(app)
    )


@pytest.fixture
def admin(connect):
    return connect("admin")


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def num_keys(app) -> int:
    with app.app_context():
        return db.session.scalar(select(func.count()).select_from(ApiKey))


def test_a_key_is_made_shown_listed_and_revoked_and_each_change_is_audited(app, admin):
    made = admin.create_key("laptop", "developer", scopes=["generate"], models=["b", "a", "a"], tokens_per_minute=5)
    assert made["key"].startswith(f"llmos_{made['prefix']}_")
    assert (made["scopes"], made["models"], made["tokens_per_minute"]) == (["generate"], ["a", "b"], 5)
    shown = admin.key(made["prefix"])
    assert shown == {name: value for name, value in made.items() if name != "key"}
    assert admin.keys()[0] == shown
    assert admin.revoke_key(made["prefix"])["state"] == "revoked"
    assert admin.revoke_key(made["prefix"])["state"] == "revoked"
    with app.app_context():
        events = db.session.scalars(select(AuditEvent).where(AuditEvent.object_id == made["prefix"])).all()
        assert [event.action for event in events] == ["key.create", "key.revoke"]
        assert {event.actor for event in events} == {f"key:{admin.key()['prefix']}"}
        assert made["key"].split("_", 2)[2] not in str([event.details for event in events])


def test_the_secret_is_in_no_other_answer_and_is_not_to_be_kept(app, plain_text):
    client, admin = app.test_client(), bearer(plain_text())
    made = client.post("/api/v1/keys", json={"name": "n"}, headers=admin)
    assert (made.status_code, made.headers["Cache-Control"]) == (201, "no-store")
    secret = made.json["key"].split("_", 2)[2]
    for path in ("/api/v1/keys", made.headers["Location"]):
        assert secret not in client.get(path, headers=admin).text
        assert "sha256" not in client.get(path, headers=admin).text


@pytest.mark.parametrize("role", [role for role in ROLES if role != "admin"])
def test_others_see_and_revoke_only_the_key_they_use(app, admin, connect, role):
    other, own = admin.create_key("other")["prefix"], connect(role)
    assert own.key()["role"] == role
    for call in (own.keys, lambda: own.create_key("n"), lambda: own.key(other), lambda: own.revoke_key(other)):
        with pytest.raises(ApiError) as refused:
            call()
        assert refused.value.status == 403
    # Whether another key exists is not told.
    with pytest.raises(ApiError) as refused:
        own.key("000000000000")
    assert refused.value.status == 403
    assert own.revoke_key("self")["state"] == "revoked"
    with pytest.raises(ApiError, match="is revoked") as refused:
        own.key()
    assert refused.value.status == 401


def test_an_administrators_key_without_the_scope_is_no_administrators_key(connect):
    limited = connect("admin", scopes=["read", "generate"])
    with pytest.raises(ApiError, match="scope 'admin'"):
        limited.create_key("n")
    assert limited.key()["scopes"] == ["read", "generate"]


ROUTES = {
    "read": ("GET", "/api/v1/jobs"),
    "generate": ("POST", "/v1/completions"),
    "jobs": ("POST", "/api/v1/jobs"),
    "deploy": ("PATCH", "/api/v1/models/starter"),
    "admin": ("GET", "/api/v1/keys"),
}


@pytest.mark.parametrize(("scope", "route"), list(itertools.product(SCOPES, SCOPES)))
def test_a_scope_opens_its_own_routes_only(app, plain_text, scope, route):
    method, path = ROUTES[route]
    answer = app.test_client().open(path, method=method, headers=bearer(plain_text("admin", scopes=[scope])))
    assert (answer.status_code == 403) == (scope != route)


@pytest.mark.parametrize(("role", "route"), list(itertools.product(ROLES, SCOPES)))
def test_without_scopes_a_key_may_what_its_role_may(app, plain_text, role, route):
    method, path = ROUTES[route]
    answer = app.test_client().open(path, method=method, headers=bearer(plain_text(role)))
    assert (answer.status_code == 403) == (route not in scopes_of(role))


def test_every_scope_may_see_its_own_key(connect):
    for scope in SCOPES:
        assert connect("admin", scopes=[scope]).key()["scopes"] == [scope]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"role": "root"}, "role has value 'root'"),
        ({"role": "Admin"}, "role has value 'Admin'"),
        ({"role": "аdmin"}, "role has value"),  # a Cyrillic letter
        ({"name": ""}, "name has 0 characters"),
        ({"name": "x" * 300}, "name has 300 characters"),
        ({"name": "a\0b"}, "printable"),
        ({"name": "a\nb"}, "printable"),
        ({"name": "a\u202eb"}, "printable"),
        ({"name": " "}, "printable"),
        ({"name": 5}, "name is not as expected"),
        ({"scopes": []}, "scopes is empty"),
        ({"scopes": ["everything"]}, "scopes has value 'everything'"),
        ({"scopes": ["deploy"]}, "as 'developer' has"),
        ({"scopes": "read"}, "scopes is not as expected"),
        ({"models": []}, "models has 0 names"),
        ({"models": ["a"] * 101}, "models has 101 names"),
        ({"models": ["../etc"]}, "models has value '../etc'"),
        ({"models": ["a/b"]}, "models has value"),
        ({"models": ["a\0"]}, "models has value"),
        ({"models": ["с" + "hat"]}, "models has value"),  # a Cyrillic letter
        ({"models": ["x" * 300]}, "models has value"),
        ({"requests_per_minute": 0}, "requests_per_minute has value 0"),
        ({"tokens_per_minute": -1}, "tokens_per_minute has value -1"),
        ({"tokens_per_minute": 10**30}, "tokens_per_minute has value"),
        ({"tokens_per_minute": True}, "tokens_per_minute is not as expected"),
        ({"tokens_per_minute": 1.5}, "tokens_per_minute is not as expected"),
        ({"expires_at": "2020-01-01T00:00:00Z"}, "expected a time to come"),
        ({"expires_at": "2099-01-01T00:00:00"}, "with a zone"),
        ({"expires_at": "soon"}, "ISO 8601"),
        ({"expires_at": "9999-12-31T23:59:59-12:00"}, "ISO 8601"),
        ({"expires_at": 4102444800}, "expires_at is not as expected"),
        ({"secret_sha256": "0"}, "secret_sha256"),
    ],
)
def test_what_no_key_can_have_is_refused_by_name_and_nothing_is_stored(app, admin, body, words):
    before = num_keys(app)
    with pytest.raises(ApiError, match=words) as refused:
        admin._ask("POST", "/api/v1/keys", json={"name": "n", **body})
    assert (refused.value.status, refused.value.code) == (400, "invalid_request")
    assert num_keys(app) == before


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_prefixes_find_nothing(app, plain_text, text):
    client, headers = app.test_client(), bearer(plain_text())
    for call in (client.get, client.delete):
        assert call(f"/api/v1/keys/{quote(text)}", headers=headers).status_code in (404, 405)
    assert client.get("/api/v1/keys/self", headers=headers).json["state"] == "active"


@pytest.mark.parametrize("text", ["' OR 1=1 --", '"; DROP TABLE api_keys; --', "🙂 Ключ"])
def test_a_name_is_only_a_name(app, admin, text):
    assert admin.create_key(text)["name"] == text
    assert (admin.keys()[0]["name"], num_keys(app)) == (text, 2)


@pytest.mark.parametrize("query", ["limit=0", "limit=201", "before=nothing", "before=%00", "before=' OR 1=1 --"])
def test_a_bad_query_is_refused(app, plain_text, query):
    assert app.test_client().get(f"/api/v1/keys?{query}", headers=bearer(plain_text())).status_code in (400, 404)


def test_pages_cover_every_key_once(app, plain_text, admin):
    made = [admin.create_key(f"k{i}")["prefix"] for i in range(5)]
    client, headers, seen, before = app.test_client(), bearer(plain_text()), [], ""
    has_more = True
    while has_more:
        page = client.get(f"/api/v1/keys?limit=2{before}", headers=headers).json
        seen += [key["prefix"] for key in page["data"]]
        has_more, before = page["has_more"], f"&before={seen[-1]}"
    assert seen[1:6] == made[::-1] and len(seen) == len(set(seen)) == 7


@pytest.mark.parametrize(
    ("kind", "params", "scope"),
    [
        ("publish", {"checkpoint": "tiny", "name": "chat"}, "jobs"),
        ("publish", {"checkpoint": "tiny", "name": "chat", "deploy": "promote"}, "deploy"),
        ("garbage-collect", {"dry_run": True}, "jobs"),
        ("garbage-collect", {}, "deploy"),
        ("adapter", {"model": "chat", "adapter": "poet", "peft_folder": "/poet"}, "deploy"),
    ],
)
def test_a_job_that_changes_what_is_served_needs_the_scope_for_that(app, plain_text, kind, params, scope):
    body, client = {"kind": kind, "params": params}, app.test_client()
    for scopes, status in ((["jobs"], 202 if scope == "jobs" else 403), (["jobs", "deploy"], 202)):
        answer = client.post("/api/v1/jobs", json=body, headers=bearer(plain_text("operator", scopes=scopes)))
        assert answer.status_code == status


def test_running_a_job_again_needs_what_submitting_it_needs(app, plain_text):
    client, full = app.test_client(), bearer(plain_text("operator"))
    body = {"kind": "publish", "params": {"checkpoint": "tiny", "name": "chat", "deploy": "promote"}}
    job = f"/api/v1/jobs/{client.post('/api/v1/jobs', json=body, headers=full).json['id']}"
    assert client.post(f"{job}/cancel", headers=full).json["state"] == "CANCELLED"
    answer = client.post(f"{job}/retry", headers=bearer(plain_text("operator", scopes=["jobs"])))
    assert (answer.status_code, "scope 'deploy'" in answer.json["detail"]) == (403, True)
    assert client.post(f"{job}/retry", headers=full).status_code == 200


def test_forcing_needs_the_scope_of_an_administrator(app, plain_text, tmp_path):
    with app.app_context():
        number = register("starter", sealed(tmp_path / "bad", "bad", passed=False)).number
    body = {"kind": "promote", "version": number, "force": True, "reason": "it must be out today"}
    path, client = "/api/v1/models/starter/deployments", app.test_client()
    answer = client.post(path, json=body, headers=bearer(plain_text("admin", scopes=["deploy"])))
    assert (answer.status_code, "needs the role 'admin'" in answer.json["detail"]) == (403, True)
    assert client.post(path, json=body, headers=bearer(plain_text("admin"))).status_code == 202


def test_a_key_for_some_models_meets_no_other(app, settings, triton, plain_text):
    triton.models["other"] = word_by_word
    with app.app_context():
        serve("other", 1)
    say_loaded(settings, Place("starter", 3), Place("other", 1))
    client, headers = app.test_client(), bearer(plain_text("developer", models=["other", "later"]))
    assert [model["id"] for model in client.get("/v1/models", headers=headers).json["data"]] == ["other"]
    assert client.get("/v1/models/other", headers=headers).status_code == 200
    assert client.get("/v1/models/other@1", headers=headers).status_code == 200
    for name in ("starter", "starter@3", "no-such-model"):
        for answer in (
            client.get(f"/v1/models/{name}", headers=headers),
            client.post("/v1/completions", json={"model": name, "prompt": "a"}, headers=headers),
        ):
            assert (answer.status_code, answer.json["error"]["code"]) == (403, "forbidden")
            assert "it may use later, other" in answer.json["error"]["message"]
    answer = client.post("/v1/completions", json={"model": "other", "prompt": "a"}, headers=headers)
    assert answer.status_code == 200
    assert {call.model for call in triton.calls} == {"other"}


def _revoke(key: ApiKey) -> None:
    key.revoked_at = now()


def _expire(key: ApiKey) -> None:
    key.expires_at = now() - timedelta(seconds=1)


@pytest.fixture
def end_key(app):
    def end_key(plain_text: str, change) -> None:
        with app.app_context():
            change(db.session.scalars(select(ApiKey).where(ApiKey.prefix == plain_text.split("_")[1])).one())
            db.session.commit()

    return end_key


@pytest.mark.parametrize("change", [_revoke, _expire])
def test_a_key_that_ends_in_a_long_completion_ends_it(app, triton, plain_text, end_key, monkeypatch, change):
    monkeypatch.setattr(watch, "RECHECK_S", 0.05)
    triton.models["starter"] = lambda call: word_by_word(call, pause_s=0.02)
    key = plain_text("developer")
    body = {"model": "starter", "prompt": "a", "max_tokens": 500, "stream": True}
    with app.test_client().post("/v1/completions", json=body, headers=bearer(key)) as answer:
        parts = iter(answer.response)
        for _ in range(3):
            assert b"choices" in next(parts)
        end_key(key, change)
        rest = list(parts)
    error = json.loads(rest[-1].removeprefix(b"data: "))["error"]
    assert error["code"] == "invalid_api_key" and ("revoked" in error["message"] or "expired" in error["message"])
    assert len(rest) < 100
    assert triton.num_cancelled == 1


@pytest.mark.parametrize("change", [_revoke, _expire])
def test_a_key_that_ends_before_a_whole_answer_is_ready_gets_none(
    app, triton, plain_text, end_key, monkeypatch, change
):
    monkeypatch.setattr(watch, "RECHECK_S", 0.0)
    key = plain_text("developer")

    def end_then_answer(call):
        end_key(key, change)
        return word_by_word(call)

    triton.models["starter"] = end_then_answer
    answer = app.test_client().post("/v1/completions", json={"model": "starter", "prompt": "a"}, headers=bearer(key))
    assert (answer.status_code, answer.json["error"]["code"]) == (401, "invalid_api_key")


@pytest.mark.parametrize("change", [_revoke, _expire])
def test_a_key_that_ends_while_a_job_is_followed_ends_that(app, connect, plain_text, end_key, monkeypatch, change):
    monkeypatch.setattr(watch, "RECHECK_S", 0.1)
    job_id = connect("operator").submit_job("export", {"checkpoint": "/m", "name": "chat"})["id"]
    key = plain_text("viewer")
    timer = threading.Timer(0.5, end_key, (key, change))
    timer.start()
    started_at = time.monotonic()
    viewer = ControlPlane("http://llmos", key, transport=httpx.WSGITransport(app))
    with pytest.raises(ApiError, match=r"is (revoked|expired)") as ended:
        list(viewer.follow_job(job_id))
    timer.join()
    assert (ended.value.status, ended.value.code) == (401, "invalid_api_key")
    assert time.monotonic() - started_at < 5
    assert app.extensions["event_stream_slots"].acquire(blocking=False)


def test_a_job_that_is_gone_ends_its_stream_with_a_sentence(app, connect):
    operator = connect("operator")
    job_id = operator.submit_job("export", {"checkpoint": "/m", "name": "chat"})["id"]

    def delete() -> None:
        with app.app_context():
            db.session.delete(db.session.get(Job, job_id))
            db.session.commit()

    timer = threading.Timer(0.3, delete)
    timer.start()
    with pytest.raises(ApiError, match="does not exist") as ended:
        list(operator.follow_job(job_id))
    timer.join()
    assert ended.value.status == 404


@pytest.mark.parametrize("unreachable", [OperationalError, InterfaceError, lambda *_: PoolTimeout("no room")])
def test_a_busy_database_ends_no_stream(app, plain_text, monkeypatch, unreachable):
    def busy(_):
        raise unreachable("SELECT", {}, Exception("database is locked"))

    monkeypatch.setattr(watch, "RECHECK_S", 0.0)
    monkeypatch.setattr(watch, "identify_again", busy)
    body = {"model": "starter", "prompt": "a", "stream": True}
    answer = app.test_client().post("/v1/completions", json=body, headers=bearer(plain_text("developer")))
    assert answer.get_data(as_text=True).endswith("data: [DONE]\n\n")


def test_a_key_without_limits_is_what_create_key_makes(app):
    with app.app_context():
        create_key("n", "operator")
        row = db.session.scalars(select(ApiKey)).one()
        assert (row.scopes, row.models, row.requests_per_minute, row.tokens_per_minute) == (None,) * 4
