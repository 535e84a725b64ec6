"""Sessions over the REST API: signing in and out, passwords, CSRF, and what ends a session."""

from __future__ import annotations

import json
import time
from datetime import timedelta

import pytest
from sqlalchemy import select

from control_plane import create_app
from control_plane.auth import hashes, services, sessions, users, watch
from control_plane.auth.hashes import Passwords, sha256
from control_plane.auth.services import create_key
from control_plane.auth.tables import AuditEvent, User, UserSession
from control_plane.errors import InvalidSession, LoginFailed
from control_plane.extensions import db, now
from control_plane.settings import Settings
from control_plane.triton_fake import word_by_word
from tests.unit.control_plane.conftest import PASSWORD

SENTENCE = "the name or the password is not right"
HOSTILE = ["..", "../users", "%2e%2e", "a/b", "a\0b", "x" * 300, "аda", "Ada", "ada ", "' OR 1=1 --", "🙂", "a..b", ""]


def audit_rows(app, action: str) -> list[tuple[str, str, dict]]:
    with app.app_context():
        rows = db.session.scalars(select(AuditEvent).where(AuditEvent.action == action).order_by(AuditEvent.id))
        return [(row.actor, row.object_id, row.details) for row in rows]


def log_in(app, name: str, password: str):
    return app.test_client().post("/api/v1/session", json={"name": name, "password": password})


def test_a_user_signs_in_is_known_and_signs_out(app, sign_in):
    browser, csrf = sign_in(role="developer")
    session = browser.get("/api/v1/session").json
    assert (session["user"]["name"], session["user"]["role"]) == ("ada", "developer")
    assert session["csrf_token"] == csrf["X-CSRF-Token"]
    assert browser.get("/api/v1/jobs").status_code == 200
    assert browser.get("/api/v1/users").status_code == 403
    token = browser.get_cookie("llmos_session").value
    assert browser.delete("/api/v1/session", headers=csrf).status_code == 204
    assert browser.get_cookie("llmos_session") is None
    browser.set_cookie("llmos_session", token)
    answer = browser.get("/api/v1/jobs")
    assert (answer.status_code, answer.json["code"]) == (401, "invalid_session")
    assert audit_rows(app, "session.create") == [("user:ada", "ada", {})]
    assert audit_rows(app, "session.revoke") == [("user:ada", "ada", {})]


def test_only_hashes_are_stored_and_no_answer_or_audit_row_has_them(app, sign_in, admin):
    browser, _ = sign_in()
    token = browser.get_cookie("llmos_session").value
    with app.app_context():
        assert db.session.scalars(select(UserSession)).one().token_sha256 == sha256(token)
        assert db.session.scalars(select(User)).one().password_hash.startswith("$argon2id$")
        details = str([row.details for row in db.session.scalars(select(AuditEvent))])
    admin.edit_user("ada", password=PASSWORD + "!")
    for text in (str(admin.users()), str(admin.user("ada")), details, str(audit_rows(app, "user.edit"))):
        assert PASSWORD not in text and "argon2" not in text and token not in text


@pytest.mark.parametrize(
    ("host", "num_proxies", "is_secure"),
    [("127.0.0.1", "0", False), ("0.0.0.0", "0", True), ("127.0.0.1", "1", True), ("127.0.0.1", "2", True)],
)
def test_the_cookie_is_for_this_site_only_and_for_no_script(tmp_path, triton, host, num_proxies, is_secure):
    variables = {"LLMOS_HOME": str(tmp_path), "LLMOS_DATABASE_URL": "sqlite://", "LLMOS_HOST": host}
    variables["LLMOS_NUM_PROXIES"] = num_proxies
    app = create_app(Settings.from_environment({**variables, "LLMOS_REDIS_URL": "redis://127.0.0.1:1/0"}), triton)
    with app.app_context():
        db.create_all()
        users.create_user("ada", PASSWORD, "viewer")
    headers = {"X-Forwarded-Proto": "https"}
    answer = app.test_client().post("/api/v1/session", json={"name": "ada", "password": PASSWORD}, headers=headers)
    cookie = answer.headers["Set-Cookie"].split("; ")
    assert {"HttpOnly", "SameSite=Strict", "Path=/", "Max-Age=43200"} <= set(cookie)
    assert ("Secure" in cookie) == is_secure
    assert answer.headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize("header", [{}, {"X-CSRF-Token": ""}, {"X-CSRF-Token": "0" * 64}, {"X-CSRF-Token": "é"}])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/api/v1/users"),
        ("PATCH", "/api/v1/users/ada"),
        ("DELETE", "/api/v1/session"),
        ("POST", "/api/v1/keys"),
        ("POST", "/api/v1/jobs"),
        ("POST", "/v1/completions"),
    ],
)
def test_a_cookie_alone_changes_nothing(app, sign_in, method, path, header):
    browser, _ = sign_in()
    answer = browser.open(path, method=method, json={"role": "viewer"}, headers=header)
    assert answer.status_code == 403
    assert "X-CSRF-Token" in answer.text
    assert audit_rows(app, "user.edit") == []


def test_the_csrf_token_of_another_session_is_none(sign_in):
    _, other = sign_in("eve", "admin")
    browser, own = sign_in()
    assert browser.delete("/api/v1/session", headers=other).status_code == 403
    assert browser.delete("/api/v1/session", headers=own).status_code == 204


def test_with_the_csrf_token_a_cookie_does_what_a_key_does(app, sign_in):
    browser, csrf = sign_in()
    made = browser.post("/api/v1/keys", json={"name": "n"}, headers=csrf)
    assert made.status_code == 201
    assert browser.get("/api/v1/keys").status_code == 200
    assert browser.delete(made.headers["Location"], headers=csrf).json["state"] == "revoked"
    assert [actor for actor, _, details in audit_rows(app, "key.create") if details["name"] == "n"] == ["user:ada"]
    answer = browser.post("/v1/completions", json={"model": "starter", "prompt": "a"}, headers=csrf)
    assert answer.status_code == 200


def test_a_key_wins_over_a_cookie(app, sign_in):
    browser, _ = sign_in()
    answer = browser.get("/api/v1/jobs", headers={"Authorization": "Bearer llmos_000000000000_x"})
    assert (answer.status_code, answer.json["code"]) == (401, "invalid_api_key")
    with app.app_context():
        key = create_key("n", "viewer")
    answer = browser.get("/api/v1/session", headers={"Authorization": f"Bearer {key}"})
    assert (answer.status_code, answer.json["code"]) == (404, "not_found")
    assert browser.get("/api/v1/keys/self").status_code == 404


@pytest.mark.parametrize("cookie", ["x", "", "é", "' OR 1=1 --", "x" * 3000])
def test_a_made_up_cookie_opens_nothing(app, cookie):
    browser = app.test_client()
    browser.set_cookie("llmos_session", cookie)
    assert browser.get("/api/v1/jobs").status_code == 401
    assert browser.get("/").status_code == 200


def test_login_by_a_form_of_another_site_is_refused(app, admin):
    admin.create_user("ada", PASSWORD)
    body = json.dumps({"name": "ada", "password": PASSWORD})
    for content_type in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None):
        answer = app.test_client().post("/api/v1/session", data=body, content_type=content_type)
        assert (answer.status_code, "Set-Cookie" in answer.headers) == (400, False)


def test_every_failed_login_gets_the_same_sentence(app, admin):
    admin.create_user("ada", PASSWORD)
    admin.create_user("gone", PASSWORD)
    admin.edit_user("gone", is_active=False)
    attempts = [
        ("ada", "wrong password"),
        ("nobody", PASSWORD),
        ("gone", PASSWORD),
        ("ada", ""),
        ("ada", PASSWORD + " "),
    ]
    attempts += [(name, PASSWORD) for name in HOSTILE] + [("ada", PASSWORD + "x" * 60_000), ("ada", "\0" * 300)]
    answers = [log_in(app, *attempt) for attempt in attempts]
    assert {answer.status_code for answer in answers} == {401}
    assert {answer.json["detail"] for answer in answers} == {SENTENCE}
    assert {answer.json["code"] for answer in answers} == {"login_failed"}
    assert log_in(app, "ada", PASSWORD).status_code == 201


def test_a_stranger_costs_as_much_hashing_as_a_wrong_password(app, admin, monkeypatch):
    admin.create_user("ada", PASSWORD)
    compared = []
    verify = Passwords.verify
    monkeypatch.setattr(
        Passwords, "verify", lambda self, found, given: compared.append(found) or verify(self, found, given)
    )
    for name in ("ada", "nobody", "../etc"):
        log_in(app, name, "wrong password")
    assert [found is not None for found in compared] == [True, False, False]


def test_the_hash_of_nobody_has_the_costs_of_a_real_one(monkeypatch):
    monkeypatch.undo()
    assert not Passwords().is_outdated(hashes.NOBODY)
    assert not Passwords().verify(None, PASSWORD)


def test_an_outdated_hash_is_renewed_at_login(app, admin, monkeypatch):
    admin.create_user("ada", PASSWORD)
    monkeypatch.setattr(hashes, "MEMORY_KIB", 128)
    app.extensions["passwords"] = Passwords()
    assert log_in(app, "ada", PASSWORD).status_code == 201
    with app.app_context():
        assert "m=128," in db.session.scalars(select(User)).one().password_hash
    assert log_in(app, "ada", PASSWORD).status_code == 201


def test_a_password_may_be_typed_on_any_keyboard(app, admin):
    admin.create_user("ada", "café au lait, please")
    assert log_in(app, "ada", "cafe\u0301 au lait, please").status_code == 201


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b'{"name": "ada"}',
        b'{"name": "ada", "password": "\\ud800"}',
        b'{"name": "\\udfff", "password": "x"}',
        b"\xff",
        b'{"name": ["ada"], "password": "x"}',
        b'{"name": "ada", "password": "x", "role": "admin"}',
        b"[" * 60_000,
    ],
)
def test_a_body_that_is_no_login_is_refused(app, body):
    answer = app.test_client().post("/api/v1/session", data=body, content_type="application/json")
    assert (answer.status_code, answer.mimetype) == (400, "application/problem+json")


def test_a_body_of_10_mb_is_too_large(app, admin, sign_in):
    browser, csrf = sign_in()
    body = {"name": "eve", "password": "x" * 10_000_000}
    for path, headers in (("/api/v1/session", {}), ("/api/v1/users", csrf)):
        assert browser.post(path, json=body, headers=headers).status_code == 413


@pytest.mark.parametrize("change", [{"password": PASSWORD + "!"}, {"is_active": False}])
def test_a_new_password_and_a_deactivation_end_every_session_of_that_user(admin, sign_in, change):
    one, two, other = sign_in("eve", "viewer")[0], sign_in("eve", "viewer")[0], sign_in("ada")[0]
    admin.edit_user("eve", **change)
    for browser in (one, two):
        assert browser.get("/api/v1/jobs").json["code"] == "invalid_session"
    assert other.get("/api/v1/jobs").status_code == 200


def test_a_deactivation_ends_the_keys_that_were_made(app, admin, sign_in):
    browser, csrf = sign_in("eve")
    made = browser.post("/api/v1/keys", json={"name": "robot", "role": "admin"}, headers=csrf).json
    robot = {"Authorization": f"Bearer {made['key']}"}
    grandchild = app.test_client().post("/api/v1/keys", json={"name": "helper"}, headers=robot).json
    assert (made["created_by"], grandchild["created_by"]) == ("user:eve", f"key:{made['prefix']}")
    sign_in("ada")
    admin.edit_user("eve", is_active=False)
    states = {key["prefix"]: key["state"] for key in admin.keys()}  # noqa: SIM118
    assert (states[made["prefix"]], states[grandchild["prefix"]]) == ("revoked", "revoked")
    assert list(states.values()).count("active") == 1
    assert app.test_client().get("/api/v1/jobs", headers=robot).status_code == 401


def test_a_lower_role_ends_the_keys_that_may_do_more(app, admin, sign_in):
    browser, csrf = sign_in("eve")
    made = {
        role: browser.post("/api/v1/keys", json={"name": role, "role": role}, headers=csrf).json
        for role in ("viewer", "developer", "admin")
    }
    robot = {"Authorization": f"Bearer {made['admin']['key']}"}
    grandchild = app.test_client().post("/api/v1/keys", json={"name": "o", "role": "operator"}, headers=robot).json
    sign_in("ada")
    admin.edit_user("eve", role="developer")
    states = {key["prefix"]: key["state"] for key in admin.keys()}  # noqa: SIM118
    assert {role: states[key["prefix"]] for role, key in made.items()} == {
        "viewer": "active",
        "developer": "active",
        "admin": "revoked",
    }
    assert states[grandchild["prefix"]] == "revoked"
    assert app.test_client().patch("/api/v1/users/eve", json={"role": "admin"}, headers=robot).status_code == 401


def test_signing_in_again_ends_what_the_browser_was_signed_in_with(app, sign_in):
    browser, _ = sign_in("eve")
    before = browser.get_cookie("llmos_session").value
    assert browser.post("/api/v1/session", json={"name": "eve", "password": PASSWORD}).status_code == 201
    with_old = app.test_client()
    with_old.set_cookie("llmos_session", before)
    assert with_old.get("/api/v1/jobs").json["code"] == "invalid_session"
    assert browser.get("/api/v1/jobs").status_code == 200


def test_a_new_role_holds_from_the_next_request_on(admin, sign_in):
    browser, _ = sign_in("eve", "admin")
    sign_in("ada", "admin")
    assert browser.get("/api/v1/users").status_code == 200
    admin.edit_user("eve", role="viewer")
    assert browser.get("/api/v1/users").status_code == 403
    assert browser.get("/api/v1/jobs").status_code == 200


def test_users_change_their_own_password_with_the_current_one(app, sign_in):
    browser, csrf = sign_in("eve", "viewer")
    other, _ = sign_in("eve", "viewer")
    new = PASSWORD + "!"
    for body, status in (
        ({"current_password": "wrong password", "password": new}, 401),
        ({"current_password": PASSWORD, "password": "short"}, 400),
        ({"password": new}, 400),
    ):
        assert browser.patch("/api/v1/session", json=body, headers=csrf).status_code == status
    body = {"current_password": PASSWORD, "password": new}
    assert browser.patch("/api/v1/session", json=body).status_code == 403
    assert browser.patch("/api/v1/session", json=body, headers=csrf).status_code == 204
    assert other.get("/api/v1/jobs").status_code == 401
    assert (log_in(app, "eve", PASSWORD).status_code, log_in(app, "eve", new).status_code) == (401, 201)
    assert audit_rows(app, "user.edit") == [("user:eve", "eve", {"password": "new"})]


def test_an_expired_session_is_over_and_is_cleared_at_the_next_login(app, sign_in):
    browser, _ = sign_in()
    with app.app_context():
        db.session.scalars(select(UserSession)).one().expires_at = now() - timedelta(seconds=1)
        db.session.commit()
    assert browser.get("/api/v1/jobs").json["code"] == "invalid_session"
    sign_in()
    with app.app_context():
        assert len(db.session.scalars(select(UserSession)).all()) == 1


def test_a_user_who_is_deactivated_while_the_password_is_checked_is_not_let_in(app, admin, monkeypatch):
    admin.create_user("ada", PASSWORD)
    verify = Passwords.verify

    def slow(self, found, given):
        admin.edit_user("ada", is_active=False)
        return verify(self, found, given)

    monkeypatch.setattr(Passwords, "verify", slow)
    with app.test_request_context(), pytest.raises(LoginFailed):
        sessions.log_in("ada", PASSWORD)


@pytest.mark.parametrize("change", [{"is_active": False}, {"password": PASSWORD + "!"}])
def test_a_login_with_a_password_that_is_replaced_meanwhile_leaves_no_session(app, admin, monkeypatch, change):
    admin.create_user("ada", PASSWORD)
    is_outdated = Passwords.is_outdated

    def slow(self, found):
        # Verified already, but the session is not there yet. The real store is shared, so its transaction ends first.
        db.session.rollback()
        admin.edit_user("ada", **change)
        return is_outdated(self, found)

    monkeypatch.setattr(Passwords, "is_outdated", slow)
    assert log_in(app, "ada", PASSWORD).json["detail"] == SENTENCE
    with app.app_context():
        assert db.session.scalars(select(UserSession)).all() == []


def test_a_session_is_not_taken_for_a_later_one_with_its_number(app, admin, sign_in):
    browser, csrf = sign_in("eve", "admin")
    with app.app_context():
        principal = sessions.principal(db.session.scalars(select(UserSession)).one())
    browser.delete("/api/v1/session", headers=csrf)
    sign_in("ada", "admin")
    # SQLite gives the row's number again.
    with app.app_context(), pytest.raises(InvalidSession):
        services.identify_again(principal)


@pytest.mark.parametrize("change", [{"is_active": False}, {"password": PASSWORD + "!"}, {"role": "viewer"}])
def test_a_session_that_ends_in_a_long_completion_ends_it(app, triton, admin, sign_in, monkeypatch, change):
    monkeypatch.setattr(watch, "RECHECK_S", 0.05)
    triton.models["starter"] = lambda call: word_by_word(call, pause_s=0.02)
    browser, csrf = sign_in("eve", "developer")
    body = {"model": "starter", "prompt": "a", "max_tokens": 500, "stream": True}
    with browser.post("/v1/completions", json=body, headers=csrf) as answer:
        parts = iter(answer.response)
        next(parts)
        admin.edit_user("eve", **change)
        rest = list(parts)
    error = json.loads(rest[-1].removeprefix(b"data: "))["error"]
    assert error["code"] == ("forbidden" if "role" in change else "invalid_session")
    assert len(rest) < 100 and triton.num_cancelled == 1


def test_hashes_are_made_a_few_at_a_time(monkeypatch):
    monkeypatch.setattr(hashes, "WAIT_S", 0.05)
    passwords = Passwords()
    for _ in range(hashes.MAX_HASHES_AT_ONCE):
        passwords._slots.acquire()
    started_at = time.monotonic()
    with pytest.raises(hashes.Overloaded, match="try again"):
        passwords.verify(None, PASSWORD)
    assert time.monotonic() - started_at < 2
    passwords._slots.release()
    assert not passwords.verify(None, PASSWORD)
    assert not passwords.verify(None, PASSWORD)
