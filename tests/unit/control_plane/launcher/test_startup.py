"""How ``llmos up`` ends when somebody stops it."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from control_plane.launcher import startup
from control_plane.launcher.console import Screen
from control_plane.settings import Settings

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("detach", [False, True])
def test_start_that_is_stopped_is_taken_down_and_a_detached_one_is_an_error(tmp_path, monkeypatch, detach):
    def stopped(settings, screen):
        raise KeyboardInterrupt

    taken_down = []
    monkeypatch.setattr(startup, "_prepare", stopped)
    monkeypatch.setattr(startup, "take_down", taken_down.append)
    monkeypatch.setattr(startup, "_clear_leftovers", lambda settings, screen: None)
    settings, screen = Settings.from_environment({"LLMOS_HOME": str(tmp_path)}), Screen(Console(file=io.StringIO()))
    if detach:
        with pytest.raises(startup.Stopped, match="was stopped before everything was ready"):
            startup.up(settings, screen, detach)
    else:
        startup.up(settings, screen, detach)
    assert taken_down == [settings]
