"""API keys, on a database in memory."""

from __future__ import annotations

from datetime import timedelta

import pytest
from sqlalchemy import select

from control_plane.auth import services
from control_plane.auth.tables import ApiKey, now
from control_plane.errors import BadRequest, NotFound, Unauthorized
from control_plane.extensions import db

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def context(app):
    with app.app_context():
        yield


def _row() -> ApiKey:
    return db.session.scalars(select(ApiKey)).one()


def test_key_is_shown_once_and_only_its_hash_is_stored():
    key = services.create_key("first", "admin")
    secret = key.split("_", 2)[2]
    row = _row()
    assert key.startswith(f"llmos_{row.prefix}_")
    assert secret not in str({name: getattr(row, name) for name in row.__table__.columns.keys()})  # noqa: SIM118


def test_authenticate_returns_the_row_of_the_key():
    assert services.authenticate(services.create_key("first", "developer")).name == "first"


def test_secret_with_underscores_is_accepted(monkeypatch):
    monkeypatch.setattr(services.secrets, "token_urlsafe", lambda _: "a_b__c_")
    assert services.authenticate(services.create_key("first", "viewer")).role == "viewer"


@pytest.mark.parametrize(
    "change", [lambda key: key + "x", lambda key: key.upper(), lambda _: "llmos_", lambda _: "", lambda _: "é"]
)
def test_anything_but_the_key_is_refused(change):
    key = services.create_key("first", "admin")
    with pytest.raises(Unauthorized):
        services.authenticate(change(key))


def test_wrong_secret_and_unknown_prefix_get_the_same_answer():
    key = services.create_key("first", "admin")
    answers = set()
    for attempt in (key + "x", "llmos_000000000000_" + key.split("_", 2)[2]):
        with pytest.raises(Unauthorized) as caught:
            services.authenticate(attempt)
        answers.add(str(caught.value))
    assert len(answers) == 1


def test_expired_key_is_refused():
    key = services.create_key("first", "admin", expires_at=now() + timedelta(seconds=60))
    assert services.authenticate(key).name == "first"
    _row().expires_at = now() - timedelta(seconds=1)
    with pytest.raises(Unauthorized, match="expired"):
        services.authenticate(key)


def test_revoked_key_is_refused_from_then_on():
    key = services.create_key("first", "admin")
    services.authenticate(key)
    services.revoke_key(_row().prefix)
    with pytest.raises(Unauthorized, match="revoked"):
        services.authenticate(key)
    with pytest.raises(NotFound):
        services.revoke_key("nope")


def test_last_use_is_noted_at_most_once_a_minute():
    key = services.create_key("first", "admin")
    services.authenticate(key)
    noted = _row().last_used_at
    services.authenticate(key)
    assert _row().last_used_at == noted
    _row().last_used_at = noted - timedelta(seconds=61)
    services.authenticate(key)
    assert _row().last_used_at >= noted


def test_unknown_role_and_empty_name_are_refused_by_name():
    with pytest.raises(BadRequest, match="role has value 'root'"):
        services.create_key("first", "root")
    with pytest.raises(BadRequest, match="name has 0 characters"):
        services.create_key("", "admin")
