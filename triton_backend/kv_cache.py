"""The key/value cache itself: per layer two tensors (rows, KV, max_model_len, D), allocated once.

It knows bytes and shapes, not who owns a row (cache_manager.py). ONNX Runtime reads and writes it in place by pointer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from triton_backend.config import LayerConfig


@dataclass(frozen=True)
class CacheTensor:
    """One layer's keys or values. ``data`` is (rows, KV, max_model_len, D) float32, contiguous."""

    name: str
    data: torch.Tensor

    def shape(self, num_rows: int) -> tuple[int, ...]:
        return (num_rows, *self.data.shape[1:])

    def pointer(self, row: int) -> int:
        return self.data[row].data_ptr()


class KVCache:
    """Owner of the cache memory; used by the model runner, on the engine thread."""

    def __init__(self, layers: tuple[LayerConfig, ...], num_rows: int, max_model_len: int) -> None:
        self.num_rows = num_rows
        self.tensors = tuple(
            CacheTensor(f"{index}.{kind}", _zeros((num_rows, layer.num_kv_heads, max_model_len, layer.head_size)))
            for index, layer in enumerate(layers)
            for kind in ("key", "value")
        )

    def copy_row(self, source: int, target: int, num_tokens: int) -> None:
        """Copy the first ``num_tokens`` positions of a row, bit for bit."""
        for tensor in self.tensors:
            tensor.data[target, :, :num_tokens] = tensor.data[source, :, :num_tokens]


def _zeros(shape: tuple[int, ...]) -> torch.Tensor:
    # NumPy's zeros come from calloc: pages cost memory only once a row is used. They must be zeros, not garbage,
    # because masked positions are still multiplied and NaN times 0 is NaN.
    return torch.from_numpy(np.zeros(shape, dtype=np.float32))
