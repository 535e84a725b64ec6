"""``python -m exporters.evaluate VERSION --suite NAME --data FILE``: metrics of one version, as JSON-lines events.

{"event": "started", "suite": "perplexity", "folder": …, "data": …}
{"event": "step", "step": "check" | "evaluate", "done": 0, "total": 2}
{"event": "progress", "step": "evaluate", "done": …, "total": …}      bytes of the data file, or items of --limit
{"event": "finished", "suite": …, "folder": …, "digest": …, "metrics": {"bits_per_byte": 1.02, …}, "counts": {…},
 "settings": {…}, "data": {"path": …, "size_bytes": …, "sha256": …}, "examples": […]}

Exit codes: 0 evaluated, whatever the metrics are · 1 failed (the last event is ``error``) · 2 wrong usage. Whatever
libraries print goes to stderr.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from exporters.__main__ import run_with_events
from exporters.evaluate.suites import SUITES, EvaluateConfig, evaluate
from exporters.events import EmitEvent


def main(arguments: Sequence[str] | None = None) -> int:
    options = vars(_parser().parse_args(arguments))

    def work(emit: EmitEvent) -> int:
        evaluate(EvaluateConfig(**{**options, "stop": tuple(options["stop"])}), emit)
        return 0

    return run_with_events(work)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m exporters.evaluate",
        description="Evaluate a version through the engine.",
        epilog="suites: " + "; ".join(f"{name}: {suite.meaning}" for name, suite in SUITES.items()),
    )
    add = parser.add_argument
    add("folder", metavar="VERSION", type=Path, help="version folder")
    add("--suite", required=True, choices=SUITES, help="what to find out")
    add("--data", metavar="FILE", type=Path, help="perplexity: text, or JSON lines with text; exact-match: pairs")
    add("--limit", metavar="N", type=int, help="read at most N tokens (perplexity) or pairs (exact-match)")
    add("--window", metavar="N", type=int, help="perplexity: tokens read at once (default: the version's context)")
    add("--stride", metavar="N", type=int, help="perplexity: tokens that each window scores (default: half a window)")
    add("--stop", metavar="TEXT", action="append", default=[], help="exact-match: a text that ends an answer")
    return parser


if __name__ == "__main__":
    sys.exit(main())
