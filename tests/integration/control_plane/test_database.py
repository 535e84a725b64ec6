"""Migrations and connections of a real SQLite file and a real PostgreSQL."""

from __future__ import annotations

import subprocess
import sys
import threading
from dataclasses import replace

import flask_migrate
import pytest
import sqlalchemy
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from control_plane import create_app, databases, upgrade_database
from control_plane.auth import services
from control_plane.auth.tables import ApiKey
from control_plane.extensions import MIGRATIONS_DIR, db
from control_plane.jobs.tables import Job
from control_plane.launcher import preflight
from control_plane.triton_fake import FakeTriton

from .processes import lock

pytestmark = pytest.mark.integration

UPGRADE = """
from control_plane import upgrade_database
from control_plane.settings import Settings

upgrade_database(Settings.from_environment())
"""


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request):
    return "" if request.param == "sqlite" else request.getfixturevalue("empty_postgresql")


@pytest.fixture
def app(settings):
    upgrade_database(settings)
    return create_app(settings, FakeTriton({}))


def test_migrations_from_empty_give_exactly_the_tables_of_the_code(app):
    with app.app_context(), db.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), db.metadata) == []


def test_upgrade_is_safe_to_repeat_and_keeps_keys(app, settings):
    with app.app_context():
        key = services.create_key("first", "admin")
    upgrade_database(settings)
    with app.app_context():
        assert services.authenticate(key).name == "first"


def test_a_key_from_before_scopes_may_what_its_role_may(app):
    with app.app_context():
        key = services.create_key("first", "operator")
        flask_migrate.downgrade(directory=str(MIGRATIONS_DIR), revision="0003")
        assert "scopes" not in {column["name"] for column in sqlalchemy.inspect(db.engine).get_columns("api_keys")}
        flask_migrate.upgrade(directory=str(MIGRATIONS_DIR))
        row = services.authenticate(key)
        assert (row.role, row.scopes, row.models, row.tokens_per_minute) == ("operator", None, None, None)


def test_every_migration_can_be_taken_back(app):
    with app.app_context():
        flask_migrate.downgrade(directory=str(MIGRATIONS_DIR), revision="base")
        assert sqlalchemy.inspect(db.engine).get_table_names() == ["alembic_version"]
        flask_migrate.upgrade(directory=str(MIGRATIONS_DIR))
        assert "api_keys" in sqlalchemy.inspect(db.engine).get_table_names()


@pytest.mark.parametrize("database_url", [""])
def test_sqlite_is_in_wal_mode_and_waits_for_locks(app):
    with app.app_context(), db.engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar() == 5000
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1


def test_key_can_be_checked_while_another_process_holds_the_write_lock(app):
    with app.app_context():
        key = services.create_key("first", "admin")
        services.authenticate(key)
        writer = sqlalchemy.create_engine(db.engine.url)
        with writer.connect() as connection:
            lock(connection, "api_keys")
            assert services.authenticate(key).name == "first"
            connection.rollback()
        writer.dispose()


def test_a_locked_database_is_waited_for_and_then_an_answer_says_try_again(app, monkeypatch):
    monkeypatch.setattr(databases, "LOCK_TIMEOUT_MS", 300)
    with app.app_context():
        key = services.create_key("first", "operator")
        db.engine.dispose()
        writer = sqlalchemy.create_engine(db.engine.url)
    client = app.test_client()
    client.environ_base["HTTP_AUTHORIZATION"] = f"Bearer {key}"
    job = {"kind": "pretrain", "params": {"name": "tiny"}}
    with writer.connect() as connection:
        lock(connection, "jobs")
        answer = client.post("/api/v1/jobs", json=job)
        assert (answer.status_code, answer.json["code"]) == (503, "database_unavailable")
        assert answer.headers["Retry-After"]
        connection.rollback()
    assert client.post("/api/v1/jobs", json=job).status_code == 202
    writer.dispose()


def test_many_threads_make_and_check_keys(app):
    failures = []

    def work(number: int) -> None:
        try:
            with app.app_context():
                services.authenticate(services.create_key(f"key {number}", "viewer"))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    with app.app_context():
        assert db.session.query(ApiKey).count() == 16


def test_what_only_one_database_could_store_is_stored_alike_in_both(app):
    with app.app_context():
        odd = {"loss": float("nan"), "most": [float("inf"), 1.5], "text": "a\0b"}
        job = Job(kind="note", params=odd, queue="default", created_by="test", error="last words\0\ud800 é…")
        db.session.add(job)
        db.session.commit()
        assert job.params == {"loss": None, "most": [None, 1.5], "text": "a\0b"}
        assert job.error == "last words�? é…"


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_two_that_start_at_once_migrate_an_empty_database_once(environment, settings):
    command = [sys.executable, "-c", UPGRADE]
    started = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for process in started:
        _, said = process.communicate(timeout=60)
        assert process.returncode == 0, said
    with create_app(settings, FakeTriton({})).app_context(), db.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), db.metadata) == []


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_preflight_wants_utf8(settings, postgresql):
    assert list(preflight._database(settings)) == []
    url = postgresql.create_database("TEMPLATE template0 ENCODING 'LATIN1' LOCALE 'C'")
    (problem,) = preflight._database(replace(settings, database_url_override=url))
    assert "has the encoding LATIN1; llmos needs UTF8" in str(problem)
    postgresql.drop_database(url)
