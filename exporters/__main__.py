"""``python -m exporters CHECKPOINT OUT``: export one checkpoint, with JSON-lines events on stdout.

Exit codes: 0 exported and proven equal · 1 failed (the last event is ``error``) · 2 wrong usage · 3 sealed, but its
certificate failed. Whatever libraries print goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from exporters import ExportConfig, ExportError, export
from exporters.config import PRECISIONS
from exporters.errors import ExportCancelled
from exporters.events import EmitEvent, Event


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    emit = _events_on_stdout()
    signal.signal(signal.SIGTERM, _cancel)
    signal.signal(signal.SIGINT, _cancel)
    try:
        config = ExportConfig(
            checkpoint=options.checkpoint,
            out=options.out,
            max_model_len=options.max_model_len,
            max_num_seqs=options.max_num_seqs,
            precision=options.precision,
            overwrite=options.overwrite,
        )
        version = export(config, emit)
    except ExportError as error:
        emit({"event": "error", "code": error.code, "message": str(error)})
        return 1
    except ExportCancelled as cancelled:
        emit({"event": "error", "code": cancelled.code, "message": str(cancelled)})
        return 1
    except Exception as error:
        traceback.print_exc()
        emit({"event": "error", "code": ExportError.code, "message": f"{type(error).__name__}: {error}"})
        return 1
    return 0 if version.passed else 3


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m exporters", description="Export a Hugging Face checkpoint to a version folder and prove it."
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="checkpoint folder, or id of a model on the Hub")
    parser.add_argument("out", metavar="OUT", type=Path, help="version folder to write")
    parser.add_argument("--max-model-len", type=int, metavar="N", help="longest prompt + output in tokens")
    parser.add_argument("--max-num-seqs", type=int, metavar="N", default=32, help="cache rows (default: 32)")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="type of weights and cache")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is a version folder")
    return parser


def _events_on_stdout() -> EmitEvent:
    """Keep stdout for events: everything else that writes to it, C++ libraries too, writes to stderr from here on."""
    sys.stdout.flush()
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def emit(event: Event) -> None:
        events.write(json.dumps(event, ensure_ascii=False) + "\n")
        events.flush()

    return emit


def _cancel(signum: int, frame: FrameType | None) -> NoReturn:
    raise ExportCancelled(f"{signal.Signals(signum).name} stopped the export; nothing was written")


if __name__ == "__main__":
    sys.exit(main())
