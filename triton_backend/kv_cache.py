"""The key/value caches themselves: two tensors per layer with one row per sequence, allocated once.

``KVCache`` holds what the decoder computes, ``CrossCache`` what the encoder computed of a source text. They know bytes
and shapes, not who owns a row (cache_manager.py). ONNX Runtime reads and writes them in place by pointer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from triton_backend.config import LayerConfig

ELEMENT_TYPES: dict[str, Any] = {"fp32": np.float32, "fp16": np.float16}
"""NumPy's types of the cache types that can be kept on CPU; NumPy has no bfloat16, nor has its attention kernel."""


@dataclass(frozen=True)
class CacheTensor:
    """One layer's keys or values. ``data`` is (rows, KV, max_len, D) of ``element_type``, contiguous."""

    name: str
    data: torch.Tensor
    element_type: Any

    def place(self, first_row: int, num_rows: int) -> tuple[Any, ...]:
        """Where ``num_rows`` rows from ``first_row`` on lie, as IOBinding takes it."""
        return ("cpu", 0, self.element_type, (num_rows, *self.data.shape[1:]), self.data[first_row].data_ptr())


class KVCache:
    """Owner of the decoder's cache memory; used by the model runner, on the engine thread."""

    def __init__(self, layers: tuple[LayerConfig, ...], num_rows: int, max_model_len: int, element_type: Any) -> None:
        self.num_rows = num_rows
        self.tensors = _cache_tensors(layers, num_rows, max_model_len, element_type)

    def copy_row(self, source: int, target: int, num_tokens: int) -> None:
        """Copy the first ``num_tokens`` positions of a row, bit for bit."""
        for tensor in self.tensors:
            tensor.data[target, :, :num_tokens] = tensor.data[source, :, :num_tokens]


class CrossCache:
    """Owner of the cross attention's cache; empty for a model without cross attention.

    ``source_lens`` int32 (rows) is how much of each row counts; what lies behind belonged to an earlier source and is
    masked. It is 1 for a row without a source, because attention over nothing is NaN.
    """

    def __init__(self, layers: tuple[LayerConfig, ...], num_rows: int, max_source_len: int, element_type: Any) -> None:
        self.tensors = _cache_tensors(layers, num_rows, max_source_len, element_type)
        self.source_lens = np.ones(num_rows, dtype=np.int32)

    def write(self, row: int, values: Sequence[np.ndarray]) -> None:
        """Keep the encoder's outputs, one (1, H, S, D) per tensor, as the source of ``row``."""
        for tensor, value in zip(self.tensors, values, strict=True):
            tensor.data[row, :, : value.shape[2]] = torch.from_numpy(value[0])
            self.source_lens[row] = value.shape[2]

    def copy_row(self, source: int, target: int) -> None:
        num_tokens = int(self.source_lens[source])
        for tensor in self.tensors:
            tensor.data[target, :, :num_tokens] = tensor.data[source, :, :num_tokens]
        self.source_lens[target] = num_tokens

    def clear_row(self, row: int) -> None:
        self.source_lens[row] = 1


def _cache_tensors(
    layers: tuple[LayerConfig, ...], num_rows: int, max_len: int, element_type: Any
) -> tuple[CacheTensor, ...]:
    # NumPy's zeros come from calloc: pages cost memory only once a row is used. They must be zeros, not garbage,
    # because masked positions are still multiplied and NaN times 0 is NaN.
    return tuple(
        CacheTensor(
            f"{index}.{kind}",
            torch.from_numpy(np.zeros((num_rows, layer.num_kv_heads, max_len, layer.head_size), element_type)),
            element_type,
        )
        for index, layer in enumerate(layers)
        for kind in ("key", "value")
    )
