"""Commands that need a database or start a child."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.control_plane.test_cli import llmos

from .processes import free_port

pytestmark = pytest.mark.integration


def test_checkpoint_that_does_not_exist_is_one_line(tmp_path: Path) -> None:
    result = llmos(tmp_path, "export", str(tmp_path / "nosuch"), str(tmp_path / "out"))
    assert result.returncode == 1
    assert "nosuch" in result.stderr and "Traceback" not in result.stderr


def test_key_is_printed_alone_and_a_wrong_role_is_refused(tmp_path: Path) -> None:
    created = llmos(tmp_path, "keys", "create", "laptop", "--role", "viewer")
    assert created.returncode == 0, created.stderr
    assert created.stdout.startswith("llmos_") and len(created.stdout.splitlines()) == 1
    refused = llmos(tmp_path, "keys", "create", "laptop", "--role", "king")
    assert refused.returncode == 1 and "'king'" in refused.stderr


def test_wrong_settings_of_an_export_are_one_line(tmp_path: Path) -> None:
    result = llmos(tmp_path, "export", str(tmp_path), str(tmp_path / "out"), "--threshold", "kl=1")
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1 and "threshold 'kl' is unknown" in result.stderr


def test_a_folder_that_is_no_version_is_not_verified(tmp_path: Path) -> None:
    result = llmos(tmp_path, "verify", str(tmp_path))
    assert result.returncode == 1
    assert "has no manifest.json" in result.stderr


def test_a_database_that_does_not_answer_is_said_without_its_password(tmp_path: Path) -> None:
    url = f"postgresql+psycopg://me:secret@127.0.0.1:{free_port()}/llmos"
    refused = llmos(tmp_path, "keys", "create", "laptop", LLMOS_DATABASE_URL=url)
    assert refused.returncode == 1
    assert refused.stderr.startswith("llmos: the database does not answer: connection")
    assert "mend LLMOS_DATABASE_URL" in refused.stderr
    assert "secret" not in refused.stderr and "Traceback" not in refused.stderr
