"""What an export costs: wall time and peak memory of each of its steps, from its own events.

The memory of a step is the largest sum, over the exporting process and its children, of resident memory seen in it,
sampled every 50 ms. Pages of a mapped weight file count as long as they are resident.
"""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import psutil

SAMPLE_INTERVAL_S = 0.05


def measure(command: Sequence[str], environment: Mapping[str, str], checkpoint_bytes: int) -> dict[str, Any]:
    """Run an export; ``command`` prints its events on stdout. Raises ExportRefused with its message if it fails."""
    began = time.monotonic()
    process = subprocess.Popen(
        command, env=dict(environment), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    samples: list[tuple[float, int]] = []
    sampler = threading.Thread(target=_sample, args=(process.pid, samples), daemon=True)
    sampler.start()
    assert process.stdout is not None
    events = [(time.monotonic(), json.loads(line)) for line in process.stdout]
    process.wait()
    ended = time.monotonic()
    sampler.join()
    last = events[-1][1] if events else {}
    if last.get("event") != "finished":
        raise ExportRefused(last.get("message", f"exit code {process.returncode}"))
    steps = [(began, "start")] + [(when, event["step"]) for when, event in events if event["event"] == "step"]
    return {
        "checkpoint_bytes": checkpoint_bytes,
        "version_bytes": last["size_bytes"],
        "passed": last["passed"],
        "seconds": ended - began,
        "peak_rss_bytes": max(rss for _, rss in samples),
        "steps": per_step(steps, ended, samples),
    }


class ExportRefused(Exception):
    """The export ended with an error; the message is its own."""


def per_step(
    steps: Sequence[tuple[float, str]], ended: float, samples: Sequence[tuple[float, int]]
) -> list[dict[str, Any]]:
    """Seconds and peak memory of each step; a step lasts until the next one begins.

    ``steps``: (time of beginning, name); ``samples``: (time, bytes). A step too short for a sample has 0 bytes.
    """
    ends = [when for when, _ in steps[1:]] + [ended]
    return [
        {
            "step": name,
            "seconds": end - begin,
            "peak_rss_bytes": max((rss for when, rss in samples if begin <= when < end), default=0),
        }
        for (begin, name), end in zip(steps, ends, strict=True)
    ]


def _sample(pid: int, samples: list[tuple[float, int]]) -> None:
    """Append (time, resident bytes of the process and its descendants) until the process has ended."""
    try:
        process = psutil.Process(pid)
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            samples.append((time.monotonic(), sum(_rss(p) for p in (process, *process.children(recursive=True)))))
            time.sleep(SAMPLE_INTERVAL_S)
    except psutil.NoSuchProcess:
        return


def _rss(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0
