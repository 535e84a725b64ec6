"""``python -m tests``: the whole suite as ``make test`` runs it; options go to pytest.

What only computes or waits runs first, in two processes, each on one core; what watches the clock runs after it, alone.
Options that name files or folders run just those, in one process.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import pytest

WATCHES_THE_CLOCK = (
    "tests/e2e",
    "tests/integration/control_plane/launcher",
    "tests/integration/control_plane/test_gunicorn.py",
    "tests/integration/control_plane/test_triton_client.py",
    "tests/integration/control_plane/test_worker.py",
)
# A file's tests share what its fixtures made, so that one process runs them all.
SIDE_BY_SIDE = ("-n2", "--dist=loadfile")
# Two processes with two threads each, which spin while they wait, are slower than two with one.
ONE_CORE = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def main(options: Sequence[str]) -> int:
    if any(Path(option.split("::")[0]).exists() for option in options):
        return pytest.main([*options])
    with mock.patch.dict(os.environ, ONE_CORE):
        first = pytest.main([*SIDE_BY_SIDE, "tests", *(f"--ignore={path}" for path in WATCHES_THE_CLOCK), *options])
    if first == pytest.ExitCode.INTERRUPTED:
        return first
    rest = pytest.main([*WATCHES_THE_CLOCK, *options])
    # Options may select nothing for one of them, but not for both.
    return max({first, rest} - {pytest.ExitCode.NO_TESTS_COLLECTED}, default=pytest.ExitCode.NO_TESTS_COLLECTED)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
