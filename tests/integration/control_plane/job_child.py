"""A child of a job, for tests: ``python -m … FILE SECONDS [--unless FILE]``.

Appends its pid to FILE, reports progress for SECONDS, and fails unless the file of ``--unless`` exists.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path


def main(file: str, seconds: str, needed: str = "") -> int:
    with Path(file).open("a") as stream:
        stream.write(f"{os.getpid()}\n")
    started_at = time.monotonic()
    number = 0
    while True:
        print(json.dumps({"event": "progress", "done": number}), flush=True)
        number += 1
        if time.monotonic() - started_at >= float(seconds):
            break
        time.sleep(0.1)
    if needed and not Path(needed).exists():
        print(json.dumps({"event": "error", "message": f"{needed} is missing"}), flush=True)
        return 1
    print(json.dumps({"event": "finished"}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
