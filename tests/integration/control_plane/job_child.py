"""A child of a job, for tests: ``python -m … FILE SECONDS [NEEDED] [NUM_LINES]``.

Appends its pid to FILE, prints NUM_LINES lines that are no events, one of them long, reports progress for SECONDS, and
fails unless the file NEEDED, if any, exists.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path


def main(file: str, seconds: str, needed: str = "", num_lines: str = "0") -> int:
    with Path(file).open("a") as stream:
        stream.write(f"{os.getpid()}\n")
    for number in range(int(num_lines)):
        print(f"line {number}" + "!" * 5000 * (number == 1), file=sys.stderr, flush=True)
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
