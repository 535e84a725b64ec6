"""The key/value caches themselves: two tensors per layer with one row per sequence, allocated once.

``KVCache`` holds what the decoder computes, ``CrossCache`` what the encoder computed of a source text. They know bytes
and shapes, not who owns a row (cache_manager.py). ONNX Runtime reads and writes them in place by pointer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from triton_backend.config import LayerConfig

CACHE_TYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# What IOBinding calls the types; NumPy has no bfloat16, so that one is named by its number in ONNX.
_ELEMENT_TYPES: dict[torch.dtype, Any] = {
    torch.float32: np.float32,
    torch.float16: np.float16,
    torch.bfloat16: 16,
    torch.int64: np.int64,
    torch.int32: np.int32,
}


def place_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Where a contiguous tensor lies, as IOBinding takes it: device, its index, element type, shape, address."""
    device = tensor.device
    return (device.type, device.index or 0, _ELEMENT_TYPES[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())


@dataclass(frozen=True)
class CacheTensor:
    """One layer's keys or values. ``data`` is (rows, KV, max_len, D), contiguous."""

    name: str
    data: torch.Tensor


class KVCache:
    """Owner of the decoder's cache memory; used by the model runner, on the engine thread."""

    def __init__(
        self,
        layers: tuple[LayerConfig, ...],
        num_rows: int,
        max_model_len: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_rows = num_rows
        self.tensors = _cache_tensors(layers, num_rows, max_model_len, dtype, device)

    def copy_tokens(self, source: int, target: int, start: int, end: int) -> None:
        """Copy positions ``start``…``end − 1`` of a row, bit for bit."""
        for tensor in self.tensors:
            tensor.data[target, :, start:end] = tensor.data[source, :, start:end]

    def save(self, row: int, num_tokens: int) -> list[torch.Tensor]:
        """The first ``num_tokens`` positions of ``row``, one (KV, S, D) per tensor, in host memory."""
        return [tensor.data[row, :, :num_tokens].to("cpu", copy=True) for tensor in self.tensors]

    def restore(self, row: int, saved: Sequence[torch.Tensor]) -> None:
        for tensor, data in zip(self.tensors, saved, strict=True):
            tensor.data[row, :, : data.shape[1]] = data


class CrossCache:
    """Owner of the cross attention's cache; empty for a model without cross attention.

    ``source_lens`` int32 (rows) is how much of each row counts; what lies behind belonged to an earlier source and is
    masked. It is 1 for a row without a source, because attention over nothing is NaN.
    """

    def __init__(
        self,
        layers: tuple[LayerConfig, ...],
        num_rows: int,
        max_source_len: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.tensors = _cache_tensors(layers, num_rows, max_source_len, dtype, device)
        self.source_lens = torch.ones(num_rows, dtype=torch.int32, device=device)

    def write(self, row: int, values: Sequence[torch.Tensor]) -> None:
        """Keep the source of ``row``: one (KV, S, D) per tensor."""
        for tensor, value in zip(self.tensors, values, strict=True):
            tensor.data[row, :, : value.shape[1]] = value.to(tensor.data.device)
            self.source_lens[row] = value.shape[1]

    def save(self, row: int) -> list[torch.Tensor]:
        num_tokens = int(self.source_lens[row])
        return [tensor.data[row, :, :num_tokens].to("cpu", copy=True) for tensor in self.tensors]

    def copy_row(self, source: int, target: int) -> None:
        num_tokens = int(self.source_lens[source])
        for tensor in self.tensors:
            tensor.data[target, :, :num_tokens] = tensor.data[source, :, :num_tokens]
        self.source_lens[target] = num_tokens

    def clear_row(self, row: int) -> None:
        self.source_lens[row] = 1


def _cache_tensors(
    layers: tuple[LayerConfig, ...], num_rows: int, max_len: int, dtype: torch.dtype, device: torch.device
) -> tuple[CacheTensor, ...]:
    return tuple(
        CacheTensor(f"{index}.{kind}", zeros((num_rows, layer.num_kv_heads, max_len, layer.head_size), dtype, device))
        for index, layer in enumerate(layers)
        for kind in ("key", "value")
    )


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros, not garbage: masked positions are still multiplied, and NaN times 0 is NaN.

    NumPy's come from calloc, so that on CPU pages cost memory only once a row is used; PyTorch's are written.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(dtype).reshape(shape)
