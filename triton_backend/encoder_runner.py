"""Runs the encoder of an encoder–decoder: one source text in, the cross attention's keys and values out.

A source runs alone and unpadded, so what it gives never depends on other requests. Owned by the model runner, on the
engine thread. Graph contract: ``input_ids``, ``attention_mask`` (1, S) int64 → ``cross.{i}.key/value`` (1, H, S, D).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from triton_backend.session import load_session


class EncoderRunner:
    """Owner of the encoder's session."""

    def __init__(self, path: Path, output_names: Iterable[str], num_threads: int, device: torch.device) -> None:
        self._session = load_session(path, num_threads, device, is_occasional=True)
        self._output_names = list(output_names)

    def encode(self, source_ids: Iterable[int]) -> list[torch.Tensor]:
        """The graph's outputs (H, S, D) for one source text of S tokens, in the order of the names given."""
        ids = np.fromiter(source_ids, dtype=np.int64)[None, :]
        outputs = self._session.run(self._output_names, {"input_ids": ids, "attention_mask": np.ones_like(ids)})
        return [torch.from_numpy(output[0]) for output in outputs]
