"""What a person sees of a child's events."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from control_plane.launcher.console import Screen
from control_plane.subprocesses import ChildEvent

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("is_terminal", [False, True])
def test_warnings_of_a_child_are_shown(is_terminal):
    shown = io.StringIO()
    with Screen(Console(file=shown, width=120, highlight=False, force_terminal=is_terminal)).child("train") as on_event:
        on_event(ChildEvent("warning", {"code": "TIME_LIMIT", "message": "training ended after 3 of 9 steps [sic]"}))
    assert "warning: training ended after 3 of 9 steps [sic]" in shown.getvalue()
