"""transformers in PyTorch on a GPU, with its default attention."""

from __future__ import annotations

from pathlib import Path

from benchmarks.engines import Generate, Limits
from benchmarks.engines.torch_sdpa import judge, load_with, prepare

__all__ = ["judge", "load", "prepare"]


def load(checkpoint: Path, folder: Path, precision: str, limits: Limits) -> Generate:
    return load_with("sdpa", checkpoint, limits, device="cuda")
