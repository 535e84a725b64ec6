"""llmos on a GPU, every operator launched by itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.engines import llmos
from benchmarks.engines.llmos import load

__all__ = ["load", "prepare"]


def prepare(checkpoint: Path, out: Path, precision: str, options: Sequence[str] = ()) -> None:
    # The tokens of every engine are judged by the original anyway.
    llmos.prepare(checkpoint, out, precision, ("--device=cuda", "--no-certify", *options))
