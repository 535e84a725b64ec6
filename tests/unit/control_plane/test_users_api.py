"""Users over the REST API: names, edits, the last administrator, and what is refused."""

from __future__ import annotations

import threading
from urllib.parse import quote

import pytest
from sqlalchemy import select

from control_plane import create_app
from control_plane.auth import users
from control_plane.auth.tables import AuditEvent, User
from control_plane.auth.users import UserEdit
from control_plane.client import ApiError
from control_plane.errors import Conflict
from control_plane.extensions import db
from control_plane.settings import Settings
from tests.unit.control_plane.conftest import PASSWORD

HOSTILE = ["..", "../users", "%2e%2e", "a/b", "a\0b", "x" * 300, "аda", "Ada", "ada ", "' OR 1=1 --", "🙂", "a..b", ""]


def audit_rows(app, action: str) -> list[tuple[str, str, dict]]:
    with app.app_context():
        rows = db.session.scalars(select(AuditEvent).where(AuditEvent.action == action).order_by(AuditEvent.id))
        return [(row.actor, row.object_id, row.details) for row in rows]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_make_and_find_no_user(app, admin, sign_in, name):
    with pytest.raises(ApiError, match="name has value") as refused:
        admin.create_user(name, PASSWORD)
    assert refused.value.status == 400
    browser, csrf = sign_in("root")
    if name:
        assert browser.get(f"/api/v1/users/{quote(name)}").status_code in (404, 405)
        answer = browser.patch(f"/api/v1/users/{quote(name)}", json={"role": "viewer"}, headers=csrf)
        assert answer.status_code in (404, 405)
    assert [user["name"] for user in admin.users()] == ["root"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"password": "short"}, "password has 5 characters"),
        ({"password": "x" * 257}, "password has 257 characters"),
        ({"password": "e\u0301" * 6}, "password has 6 characters"),
        ({"password": 123456789012}, "password is not as expected"),
        ({"role": "root"}, "role has value 'root'"),
        ({"role": "' OR 1=1 --"}, "role has value"),
        ({"is_active": True}, "is_active"),
        ({"password_hash": "x"}, "password_hash"),
    ],
)
def test_what_no_user_can_have_is_refused_by_name(admin, body, words):
    with pytest.raises(ApiError, match=words) as refused:
        admin._ask("POST", "/api/v1/users", json={"name": "ada", "password": PASSWORD, **body})
    assert refused.value.status == 400
    assert "xxxx" not in str(refused.value) and admin.users() == []


def test_a_name_is_taken_once(admin):
    admin.create_user("ada", PASSWORD)
    with pytest.raises(ApiError, match="already") as refused:
        admin.create_user("ada", PASSWORD)
    assert (refused.value.status, len(admin.users())) == (409, 1)


@pytest.mark.parametrize(
    "body",
    [{}, {"role": "root"}, {"role": None}, {"is_active": "yes"}, {"is_active": 1}, {"name": "eve"}, {"password": "x"}],
)
def test_a_bad_edit_changes_nothing(app, admin, body):
    before = admin.create_user("ada", PASSWORD)
    with pytest.raises(ApiError) as refused:
        admin._ask("PATCH", "/api/v1/users/ada", json=body)
    assert (refused.value.status, admin.user("ada")) == (400, before)
    assert audit_rows(app, "user.edit") == []


def test_an_edit_counts_the_revision_and_is_audited(app, admin):
    made = admin.create_user("ada", PASSWORD)
    edited = admin.edit_user("ada", made["revision"], role="operator")
    assert (edited["role"], edited["revision"]) == ("operator", 2)
    with pytest.raises(ApiError, match="somebody else") as refused:
        admin.edit_user("ada", made["revision"], role="viewer")
    assert (refused.value.status, admin.user("ada")) == (412, edited)
    actor = f"key:{admin.key()['prefix']}"
    assert audit_rows(app, "user.create") == [(actor, "ada", {"role": "viewer"})]
    assert audit_rows(app, "user.edit") == [(actor, "ada", {"role": "operator"})]


def test_the_etag_is_the_revision(app, sign_in):
    browser, csrf = sign_in()
    etag = browser.get("/api/v1/users/ada").headers["ETag"]
    for given, status in ((etag, 200), (etag, 412), ("*", 200), ('"x"', 400)):
        answer = browser.patch("/api/v1/users/ada", json={"role": "admin"}, headers={**csrf, "If-Match": given})
        assert answer.status_code == status


@pytest.mark.parametrize("change", [{"role": "operator"}, {"is_active": False}, {"role": "admin", "is_active": False}])
def test_the_last_active_administrator_stays(app, admin, change):
    admin.create_user("ada", PASSWORD, "admin")
    admin.create_user("gone", PASSWORD, "admin")
    admin.edit_user("gone", is_active=False)
    with pytest.raises(ApiError, match="last active administrator") as refused:
        admin.edit_user("ada", **change)
    assert refused.value.status == 409
    assert (admin.user("ada")["role"], admin.user("ada")["is_active"]) == ("admin", True)
    admin.edit_user("gone", is_active=True)
    admin.edit_user("ada", **change)


def test_two_administrators_who_demote_each_other_leave_one(tmp_path, triton):
    variables = {"LLMOS_HOME": str(tmp_path), "LLMOS_REDIS_URL": "redis://127.0.0.1:1/0"}
    app = create_app(Settings.from_environment(variables), triton)
    with app.app_context():
        db.create_all()
        for name in ("ada", "eve"):
            users.create_user(name, PASSWORD, "admin")
    refused, barrier = [], threading.Barrier(2)

    def demote(name: str) -> None:
        with app.app_context():
            barrier.wait()
            try:
                users.edit_user(name, UserEdit(role="viewer"), None)
            except Conflict:
                refused.append(name)

    for _ in range(5):
        threads = [threading.Thread(target=demote, args=(name,)) for name in ("ada", "eve")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with app.app_context():
            found = [user.name for user in users.find_users(None, 9) if user.role == "admin"]
            assert (len(found), refused) == (1, found)
            db.session.query(User).update({"role": "admin"})
            db.session.commit()
        refused.clear()


def test_pages_cover_every_user_once(app, admin, sign_in):
    names = sorted(f"u{i}" for i in range(5))
    for name in names:
        admin.create_user(name, PASSWORD)
    browser, _ = sign_in("zoe")
    seen, after, has_more = [], "", True
    while has_more:
        page = browser.get(f"/api/v1/users?limit=2{after}").json
        seen += [user["name"] for user in page["data"]]
        has_more, after = page["has_more"], f"&after={seen[-1]}"
    assert seen == [*names, "zoe"] == [user["name"] for user in admin.users()]


@pytest.mark.parametrize("role", ["viewer", "developer", "operator"])
def test_only_administrators_see_and_change_users(sign_in, role):
    browser, csrf = sign_in("eve", role)
    for method, path in (("GET", ""), ("POST", ""), ("GET", "/eve"), ("PATCH", "/eve"), ("PATCH", "/nobody")):
        answer = browser.open(f"/api/v1/users{path}", method=method, json={"role": "admin"}, headers=csrf)
        assert answer.status_code == 403
