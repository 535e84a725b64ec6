"""Runs the encoder of an encoder–decoder: one source text in, the cross attention's keys and values out.

A source runs alone and unpadded, so what it gives never depends on other requests. Owned by the model runner, on the
engine thread. Graph contract: ``input_ids``, ``attention_mask`` (1, S) int64 → ``cross.{i}.key/value`` (1, H, S, D).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from triton_backend.kv_cache import CacheTensor, place_of
from triton_backend.session import load_session, run_options


class EncoderRunner:
    """Owner of the encoder's session; ``cache`` is where what it gives will be kept."""

    def __init__(self, path: Path, cache: Sequence[CacheTensor], num_threads: int, device: torch.device) -> None:
        self._session = load_session(path, num_threads, device, is_occasional=True)
        self._cache = cache
        self._device = device
        self._run_options = run_options()

    def encode(self, source_ids: Iterable[int]) -> list[torch.Tensor]:
        """The graph's outputs (H, S, D) for one source text of S tokens, in the order of the cache."""
        ids = torch.from_numpy(np.fromiter(source_ids, dtype=np.int64)[None, :]).to(self._device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        outputs = {f"cross.{tensor.name}": _room(tensor.data, ids.shape[1]) for tensor in self._cache}
        binding = self._session.io_binding()
        for name, value in inputs.items():
            binding.bind_input(name, *place_of(value))
        for name, value in outputs.items():
            binding.bind_output(name, *place_of(value))
        self._session.run_with_iobinding(binding, self._run_options)
        return [value[0] for value in outputs.values()]


def _room(rows: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """For one source (1, H, S, D) of what ``rows`` (rows, H, max_source_len, D) keeps."""
    return torch.empty((1, rows.shape[1], num_tokens, rows.shape[3]), dtype=rows.dtype, device=rows.device)
