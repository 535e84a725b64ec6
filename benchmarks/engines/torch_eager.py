"""transformers in PyTorch with attention written out in matrix products."""

from __future__ import annotations

from pathlib import Path

from benchmarks.engines import Generate, Limits
from benchmarks.engines.torch_sdpa import load_with, prepare

__all__ = ["load", "prepare"]


def load(checkpoint: Path, folder: Path, precision: str, limits: Limits) -> Generate:
    return load_with("eager", checkpoint, limits)
