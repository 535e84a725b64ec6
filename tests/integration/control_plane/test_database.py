"""Migrations and the settings of a real SQLite file."""

from __future__ import annotations

import threading

import flask_migrate
import pytest
import sqlalchemy
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from control_plane import create_app, upgrade_database
from control_plane.auth import services
from control_plane.auth.tables import ApiKey
from control_plane.extensions import MIGRATIONS_DIR, db
from control_plane.triton_fake import FakeTriton

pytestmark = pytest.mark.integration


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
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            assert services.authenticate(key).name == "first"
            connection.rollback()
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
