"""Children that report by JSON lines: their events, their failures, their end."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import psutil
import pytest

from control_plane.subprocesses import ChildEvent, ChildFailed, run_child

pytestmark = pytest.mark.unit


def run(script: str) -> tuple[ChildEvent | None, list[ChildEvent]]:
    events: list[ChildEvent] = []
    return run_child([sys.executable, "-c", script], events.append), events


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_events_come_in_order_and_the_finished_one_is_returned() -> None:
    finished, events = run(
        'print(\'{"event": "step", "step": "trace", "done": 1, "total": 3}\', flush=True)\n'
        'print(\'{"event": "finished", "digest": "ab"}\')'
    )
    assert [event.event for event in events] == ["step", "finished"]
    assert (events[0].step, events[0].fields["total"]) == ("trace", 3)
    assert finished is not None and finished.fields["digest"] == "ab"


def test_lines_that_are_no_events_are_tolerated() -> None:
    lines = ["a library prints", '{"torn": ', "[1]", '{"event": 5}', '{"event": "step", "step": "ü"}', '{"event": "fin']
    finished, events = run(f"import sys; sys.stdout.buffer.write({chr(10).join(lines)!r}.encode() + b'\\xff')")
    assert finished is None
    assert [event.step for event in events] == ["ü"]


def test_log_lines_of_both_streams_are_handed_on() -> None:
    script = (
        "import sys; print('a library prints'); print('{\"event\": \"step\"}'); print('a warning', file=sys.stderr)"
    )
    lines: list[tuple[str, str]] = []
    run_child([sys.executable, "-c", script], lambda event: None, on_line=lambda *line: lines.append(line))
    assert sorted(lines) == [("stderr", "a warning"), ("stdout", "a library prints")]


def test_failed_child_is_explained_by_its_own_error_event() -> None:
    script = 'print(\'{"event": "error", "message": "no such checkpoint"}\'); import sys; sys.exit("noise")'
    with pytest.raises(ChildFailed, match=r"^no such checkpoint$"):
        run(script)


def test_failed_child_without_an_event_is_explained_by_the_end_of_its_stderr() -> None:
    with pytest.raises(ChildFailed, match=r"(?s)ended with exit code 1:\n.*ValueError: boom") as caught:
        run("import sys\nfor i in range(5000): print('line', i, file=sys.stderr)\nraise ValueError('boom')")
    assert len(str(caught.value).splitlines()) < 50


def test_killed_child_is_named_by_its_signal() -> None:
    with pytest.raises(ChildFailed, match="was killed by SIGKILL"):
        run("import os; os.kill(os.getpid(), 9)")


def test_much_output_on_both_streams_does_not_block() -> None:
    _, events = run(
        "import sys\nfor i in range(20000):\n  print('x' * 100, file=sys.stderr); print('{\"event\": \"progress\"}')"
    )
    assert len(events) == 20000


@pytest.mark.parametrize(("end", "status"), [("exit 0", 0), ("kill -9 $$", -9)])
def test_what_a_child_leaves_running_ends_with_it(tmp_path: Path, end: str, status: int) -> None:
    """It has the child's pipes, which would stay open."""
    started_at = time.monotonic()
    command = ["sh", "-c", f"sleep 60 & echo $! > {tmp_path / 'pid'}; {end}"]
    run_child(command, lambda event: None, good_statuses=(status,))
    assert time.monotonic() - started_at < 10
    while is_alive(int((tmp_path / "pid").read_text())):
        assert time.monotonic() - started_at < 10
        time.sleep(0.05)


def test_interrupt_ends_the_child_and_everything_it_started(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    script = (
        "import os, subprocess, sys, time, signal\n"
        # The grandchild ignores SIGTERM, as a stuck library would.
        "ignore = 'import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); '\n"
        "code = ignore + 'print(1, flush=True); time.sleep(60)'\n"
        "child = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE)\n"
        "child.stdout.readline()\n"
        f"open({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}')\n"
        'print(\'{"event": "started"}\', flush=True)\n'
        "time.sleep(60)"
    )

    def interrupt(event: ChildEvent) -> None:
        raise KeyboardInterrupt

    started_at = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_child([sys.executable, "-c", script], interrupt)
    assert time.monotonic() - started_at < 8
    deadline = time.monotonic() + 5
    while any(is_alive(int(pid)) for pid in pids.read_text().split()):
        assert time.monotonic() < deadline
