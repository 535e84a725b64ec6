"""What a process uses: memory now, and the most it used since it was last asked. Linux's /proc only.

Resident memory of files that are mapped, such as safetensors, counts as well, though the system may take it back.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import resource
from dataclasses import dataclass
from pathlib import Path

CLEAR_REFS = Path("/proc/self/clear_refs")
RESET_PEAK = "5"
"""Sets the peak to what is in use now: https://man7.org/linux/man-pages/man5/proc_pid_clear_refs.5.html"""


@dataclass(frozen=True)
class StepUsage:
    """What one step of an export took. Where the system does not let the peak be reset, it is the peak so far."""

    seconds: float
    peak_rss_bytes: int


def rss_bytes() -> int:
    return _status_bytes("VmRSS", "self")


def peak_rss_bytes() -> int:
    return _status_bytes("VmHWM", "self") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux


def peak_rss_bytes_of(pid: int) -> int | None:
    """Of a child that still runs. What ``wait4`` says of one that ended begins with the peak of its parent."""
    return _status_bytes("VmHWM", str(pid)) or None


def return_freed_memory() -> None:
    """Give memory that was freed back to the system, which the C library keeps otherwise; nothing without glibc."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def reset_peak() -> None:
    with contextlib.suppress(OSError):
        CLEAR_REFS.write_text(RESET_PEAK, encoding="ascii")


def _status_bytes(name: str, process: str) -> int:
    try:
        status = Path("/proc", process, "status").read_text(encoding="utf-8")
        found = re.search(rf"^{name}:\s+(\d+) kB$", status, re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0
