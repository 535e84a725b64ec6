"""A model repository whose disk is full while a version is installed: the deployment says so, nothing is half-made."""

# ruff: noqa: F401, F811 (fixtures of another folder)
from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from control_plane import durable_folders
from control_plane.artifacts import artifact_store
from control_plane.registry import services
from control_plane.registry.model_directory import ensure_installed
from control_plane.registry.places import Place
from control_plane.settings import Settings
from tests.disks import small_disk
from tests.unit.control_plane.registry.test_reconciler import (
    CANARY_2,
    CHAT_1,
    app,
    deploy,
    is_loaded,
    publish,
    state_of,
    tick_until,
    triton,
)

pytestmark = pytest.mark.integration


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[Settings]:
    """The model repository lies on a file system of one MiB."""
    with small_disk(tmp_path / "models", "1m") as models:
        yield Settings.from_environment(
            {
                "LLMOS_HOME": str(tmp_path / "home"),
                "LLMOS_MODEL_REPOSITORY": str(models),
                "LLMOS_PROBE_INTERVAL_S": "0.05",
                "LLMOS_REDIS_URL": "redis://127.0.0.1:1/0",
            }
        )


def fill(folder: Path) -> Path:
    """Take all space that is left on the disk of ``folder``."""
    filler = folder / "filler"
    filler.write_bytes(b"\0" * durable_folders.free_bytes(folder))
    return filler


@pytest.mark.parametrize("is_seen_before", [True, False], ids=["before", "in the middle"])
@pytest.mark.parametrize("is_beside", [True, False], ids=["copied", "fetched"])
def test_a_version_for_which_there_is_no_room_is_blocked_and_served_when_there_is(
    tick_until, triton, publish, deploy, state_of, app, settings, monkeypatch, is_seen_before, is_beside
) -> None:
    tick_until(is_loaded(CHAT_1))
    publish()
    repository = settings.model_repository
    if is_beside:
        with app.app_context():
            wanted = services.get_version("chat", 2).digest
        ensure_installed(repository, artifact_store(settings), Place("chat", 2), wanted)
    filler = fill(repository)
    if not is_seen_before:
        monkeypatch.setattr(durable_folders, "require_space", lambda *_: None)
    number = deploy("canary", 2, 10.0)
    tick_until(lambda _: state_of(number).state != "InProgress")
    blocked = state_of(number)
    assert (blocked.state, blocked.failure_reason) == ("BlockedByFailedLoad", "ModelLoadFailed")
    for part in ("cannot copy", "No space left on device", "MiB are free there", "free some space and try again"):
        assert part in blocked.failure_message
    assert triton.orders == ["load chat [1]"]
    assert [path.name for path in (repository / "chat.canary").iterdir()] == ["adapters"]
    tick_until(is_loaded(CHAT_1))
    filler.unlink()
    number = deploy("canary", 2, 10.0)
    tick_until(is_loaded(CHAT_1, CANARY_2))
    assert state_of(number).state == "UpToDate"
