"""The file that tells what is being served."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from control_plane.registry import serving_state
from control_plane.registry.places import Place
from control_plane.registry.serving_state import ModelState, ServingState
from control_plane.settings import Settings

pytestmark = pytest.mark.unit


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings.from_environment({"LLMOS_HOME": str(tmp_path)})


def test_written_state_is_read_back(settings: Settings) -> None:
    failed = ModelState(2, "FailedToLoad", 1000.5, "ModelLoadFailed", "model.onnx.data differs", 3)
    places = {Place("chat", 2): failed, Place("chat.canary", 3): ModelState(3, "Loaded", 1000.0)}
    state = ServingState({"chat": failed}, True, time.time(), places)
    serving_state.write(settings, state)
    assert serving_state.read(settings) == state
    assert state.is_current


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"models": {"chat": {"unknown": 1}}}'])
def test_file_that_is_absent_or_torn_says_nothing(settings: Settings, text: str | None) -> None:
    if text is not None:
        settings.run_dir.mkdir()
        serving_state.path_of(settings).write_text(text)
    assert serving_state.read(settings) == ServingState()


def test_a_version_is_found_where_it_is_loaded() -> None:
    loaded, loading = ModelState(2, "Loaded", 0.0), ModelState(2, "Loading", 0.0)
    chat, canary = Place("chat", 2), Place("chat.canary", 2)
    assert ServingState(places={chat: loading, canary: loaded}).where("chat", 2) == (canary, loaded)
    assert ServingState(places={chat: loaded, canary: loaded}).where("chat", 2) == (chat, loaded)
    assert ServingState(places={canary: loading}).where("chat", 2) == (canary, loading)
    assert ServingState(places={chat: loaded}).where("chat", 3) is None


def test_old_state_is_not_current() -> None:
    assert not ServingState(updated_at=time.time() - 60).is_current
