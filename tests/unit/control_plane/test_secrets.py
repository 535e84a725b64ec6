"""Secrets of an installation: made once, seen by every process alike, readable by nobody else."""

from __future__ import annotations

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from control_plane.secrets import secret, triton_admin_key
from control_plane.settings import Settings

pytestmark = pytest.mark.unit


def settings_in(folder: Path) -> Settings:
    return Settings.from_environment({"LLMOS_HOME": str(folder)})


def test_secret_is_made_once_and_is_private(tmp_path: Path) -> None:
    key = triton_admin_key(settings_in(tmp_path))
    assert len(key) == 43
    assert triton_admin_key(settings_in(tmp_path)) == key
    files = list((tmp_path / "secrets").iterdir())
    assert [path.name for path in files] == ["triton_admin_key"]
    assert stat.S_IMODE(files[0].stat().st_mode) == 0o600
    assert stat.S_IMODE(files[0].parent.stat().st_mode) == 0o700


def test_secrets_differ_by_name_and_installation(tmp_path: Path) -> None:
    one, two = settings_in(tmp_path / "one"), settings_in(tmp_path / "two")
    assert len({secret(one, "a"), secret(one, "b"), secret(two, "a")}) == 3


def test_all_who_ask_at_once_get_the_same_secret(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    with ThreadPoolExecutor(16) as pool:
        assert len(set(pool.map(lambda _: triton_admin_key(settings), range(64)))) == 1
