"""Runs a child process that reports by JSON lines on stdout: exports, training recipes, data jobs.

    {"event": "started" | "step" | "progress" | "metrics" | "finished" | "error", "step": …, "done": …, "total": …, …}

The child leads a process group of its own, which is killed whole when the caller is interrupted or raises, and when the
child has ended; the child itself is killed by the kernel when the caller dies, however that happens. Lines that are no
such object (a library's prints, a torn last line) are log lines, as those of stderr: they go to ``on_line``, and the
last of them into the error message. It knows nothing of what the child does.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from control_plane.errors import ControlPlaneError

KEPT_LINES = 40
STOP_GRACE_S = 5.0
PR_SET_PDEATHSIG = 1
# Looked up before any fork: between fork and exec nothing may be imported.
_prctl = ctypes.CDLL(None).prctl


class ChildFailed(ControlPlaneError):
    """A child ended badly; the text is its own last error event, or else the end of its stderr."""

    code = "child_failed"


@dataclass(frozen=True)
class ChildEvent:
    """One line of a child; ``fields`` is the whole object."""

    event: str
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def step(self) -> str | None:
        return self.fields.get("step")

    @property
    def message(self) -> str | None:
        return self.fields.get("message")

    @classmethod
    def parse(cls, line: str) -> ChildEvent | None:
        """The event on ``line``, or None if the line is something else."""
        try:
            document = json.loads(line)
        except (ValueError, RecursionError):
            return None
        if not isinstance(document, dict) or not isinstance(document.get("event"), str):
            return None
        return cls(document["event"], document)


def run_child(
    command: Sequence[str | os.PathLike[str]],
    on_event: Callable[[ChildEvent], None],
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    good_statuses: Sequence[int] = (0,),
    on_start: Callable[[subprocess.Popen[str]], None] = lambda child: None,
    on_line: Callable[[str, str], None] = lambda stream, line: None,
) -> ChildEvent | None:
    """Run ``command`` to its end, handing every event to ``on_event``, and return its ``finished`` event, if any.

    Raises ChildFailed unless it ends with one of ``good_statuses``. Whatever ``on_event`` raises, KeyboardInterrupt
    included, stops the child and is passed on. ``on_start`` gets the process, for somebody who may stop it meanwhile.
    ``on_line`` gets log lines, with ``stdout`` or ``stderr`` before them, from two threads; it must not raise.
    """
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        errors="replace",
        env=environment,
        cwd=folder,
        start_new_session=True,
        preexec_fn=_die_with_parent,
    )
    assert child.stdout is not None and child.stderr is not None
    last_lines: deque[str] = deque(maxlen=KEPT_LINES)

    def keep(stream: str, line: str) -> None:
        last_lines.append(line.rstrip())
        on_line(stream, line.rstrip())

    reader = threading.Thread(target=_read, args=(child.stderr, keep), daemon=True)
    reader.start()
    threading.Thread(target=_end_group_with, args=(child,), daemon=True).start()
    finished = failed = None
    try:
        on_start(child)
        for line in child.stdout:
            event = ChildEvent.parse(line)
            if event is None:
                keep("stdout", line)
                continue
            finished = event if event.event == "finished" else finished
            failed = event if event.event == "error" else failed
            on_event(event)
        status = child.wait()
    except BaseException:
        stop_group(child)
        raise
    finally:
        child.stdout.close()
    reader.join(timeout=1.0)
    if status not in good_statuses:
        raise ChildFailed(_explain(command, status, failed, last_lines))
    return finished


def stop_group(child: subprocess.Popen[str]) -> None:
    """End a child and everything it started: SIGTERM, then after a grace SIGKILL."""
    _signal_group(child, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(STOP_GRACE_S)
    # The group may outlive its leader.
    _signal_group(child, signal.SIGKILL)
    child.wait()


def _end_group_with(child: subprocess.Popen[str]) -> None:
    """What a child leaves behind when it ends would hold its pipes open."""
    with contextlib.suppress(ChildProcessError):
        # Not reaped here, so that its number stays its own.
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        _signal_group(child, signal.SIGKILL)


def _die_with_parent() -> None:
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _signal_group(child: subprocess.Popen[str], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, number)


def _read(stderr: IO[str], keep: Callable[[str, str], None]) -> None:
    with stderr:
        for line in stderr:
            keep("stderr", line)


def _explain(
    command: Sequence[str | os.PathLike[str]], status: int, failed: ChildEvent | None, last_lines: deque[str]
) -> str:
    if failed is not None and failed.message:
        return failed.message
    name = " ".join(str(part) for part in command[1:4])
    ended = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with exit code {status}"
    said = "\n".join(line for line in last_lines if line.strip())
    return f"{name} {ended}" + (f":\n{said}" if said else " and said nothing")
