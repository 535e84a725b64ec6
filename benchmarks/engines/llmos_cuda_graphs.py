"""llmos on a GPU, a decode step launched as one CUDA graph."""

from __future__ import annotations

from pathlib import Path

from benchmarks.engines import llmos_cuda
from benchmarks.engines.llmos import load

__all__ = ["load", "prepare"]


def prepare(checkpoint: Path, out: Path, precision: str) -> None:
    llmos_cuda.prepare(checkpoint, out, precision, ("--engine=cuda_graphs=true",))
