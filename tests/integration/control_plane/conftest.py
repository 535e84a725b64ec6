"""Real processes for the tests of this folder: Redis, PostgreSQL, a worker, a gunicorn; each on a port of its own."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from control_plane import create_app, upgrade_database
from control_plane.settings import Settings
from control_plane.triton_fake import FakeTriton

from .job_kinds import TEST_KINDS
from .postgresql_server import PostgresqlServer
from .processes import Process, Redis, free_port
from .running_jobs import Jobs


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgresqlServer]:
    # Not pytest's own folder, which nobody else may enter.
    folder = Path(tempfile.mkdtemp(prefix="llmos-postgresql-"))
    server = PostgresqlServer(folder, free_port())
    yield server
    server.stop(signal.SIGQUIT)
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def migrated_database(postgresql: PostgresqlServer, tmp_path_factory: pytest.TempPathFactory) -> str:
    url = postgresql.create_database()
    home = str(tmp_path_factory.mktemp("migrated"))
    upgrade_database(Settings.from_environment({"LLMOS_HOME": home, "LLMOS_DATABASE_URL": url}))
    return url


@pytest.fixture
def empty_postgresql(postgresql: PostgresqlServer) -> Iterator[str]:
    """URL of a PostgreSQL database without tables."""
    url = postgresql.create_database()
    yield url
    postgresql.drop_database(url)


@pytest.fixture
def migrated_postgresql(postgresql: PostgresqlServer, migrated_database: str) -> Iterator[str]:
    """URL of a PostgreSQL database with the newest schema and no rows."""
    yield migrated_database
    postgresql.clear_database(migrated_database)


@pytest.fixture
def database_url() -> str:
    """Empty for the SQLite file in LLMOS_HOME; tests for several databases override it."""
    return ""


@pytest.fixture
def environment(tmp_path: Path, database_url: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LLMOS_")}
    return {
        **kept,
        "LLMOS_HOME": str(tmp_path / "home"),
        "LLMOS_MODEL_REPOSITORY": str(tmp_path / "models"),
        "LLMOS_DATABASE_URL": database_url,
        "LLMOS_REDIS_PORT": str(free_port()),
        "LLMOS_WEB_PORT": str(free_port()),
    }


@pytest.fixture
def settings(environment: dict[str, str]) -> Settings:
    return Settings.from_environment(environment)


@pytest.fixture
def redis_process(settings: Settings, environment: dict[str, str], tmp_path: Path) -> Iterator[Redis]:
    process = Redis(settings, environment, tmp_path)
    yield process
    process.stop()


@pytest.fixture
def worker(redis_process: Redis, environment: dict[str, str], tmp_path: Path) -> Iterator[Process]:
    command = [sys.executable, "-m", "celery", "--app=control_plane.worker", "worker"]
    process = Process(
        [*command, "--pool=threads", "--queues=default", "--loglevel=info"], environment, tmp_path / "worker.log"
    )
    yield process
    process.stop()


@pytest.fixture
def app(settings, redis_process):
    upgrade_database(settings)
    app = create_app(settings, FakeTriton({}))
    app.extensions["job_kinds"] = {**app.extensions["job_kinds"], **TEST_KINDS}
    return app


@pytest.fixture
def start_worker(environment, tmp_path) -> Iterator[Callable[[], Process]]:
    started: list[Process] = []

    def start() -> Process:
        command = [sys.executable, "-m", "celery", "--app=tests.integration.control_plane.job_worker", "worker"]
        options = ["--pool=threads", "--concurrency=1", "--queues=default", f"--hostname=w{len(started)}@%h"]
        started.append(Process([*command, *options], environment, tmp_path / f"worker-{len(started)}.log"))
        return started[-1]

    yield start
    for process in started:
        process.stop()


@pytest.fixture
def jobs(app):
    return Jobs(app)
