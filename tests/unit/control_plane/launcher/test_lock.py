"""One launcher per installation."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from control_plane.launcher.lock import AlreadyRunning, Launch, is_held, launch_lock, read_launch, write_launch
from control_plane.settings import PROJECT_ROOT, Settings

pytestmark = pytest.mark.unit


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings.from_environment({"LLMOS_HOME": str(tmp_path)})


def test_second_holder_is_refused_until_the_first_is_done(settings: Settings) -> None:
    with launch_lock(settings):
        assert is_held(settings)
        with pytest.raises(AlreadyRunning, match=str(settings.home)), launch_lock(settings):
            pass
    assert not is_held(settings)


def test_lock_of_a_killed_holder_is_free(settings: Settings) -> None:
    script = (
        "import time; from control_plane.launcher.lock import *; from control_plane.settings import Settings\n"
        "with launch_lock(Settings.from_environment()): print('held', flush=True); time.sleep(60)"
    )
    environment = {**os.environ, "LLMOS_HOME": str(settings.home)}
    child = subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, cwd=PROJECT_ROOT)
    assert child.stdout is not None
    with child, child.stdout:
        child.stdout.readline()
        assert is_held(settings)
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert not is_held(settings)


def test_launch_is_read_while_the_lock_is_held(settings: Settings) -> None:
    assert read_launch(settings) is None
    with launch_lock(settings):
        write_launch(settings, Launch(os.getpid(), detached=True))
        assert read_launch(settings) == Launch(os.getpid(), detached=True)
        assert is_held(settings)
