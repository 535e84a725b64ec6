"""LoRA adapters in memory: stacked matrices that are inputs of the graph, and which row uses which of them.

The graph adds ``x · a[slot] · b[slot]`` to the products that adapters may change, with one slot per row; slot 0 is
zero and stays so. Owned by the model runner, on the engine thread. A graph without adapters has no slots and no inputs.

    lora.{name}.a  (slots + 1, in_features, rank)     adapter_ids  int64 (B)
    lora.{name}.b  (slots + 1, rank, out_features)
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from triton_backend.config import LoraConfig
from triton_backend.errors import InvalidRequest
from triton_backend.kv_cache import zeros


class AdapterSlots:
    """Owner of the matrices and of ``adapter_ids``, one per cache row."""

    def __init__(self, config: LoraConfig | None, num_rows: int, device: torch.device) -> None:
        config = config or LoraConfig(num_slots=0, rank=0, targets=())
        num_slots = config.num_slots + 1
        self.num_slots = config.num_slots
        self.adapter_ids = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self._slots = [0] * num_rows
        self.tensors: dict[str, torch.Tensor] = {}
        for target in config.targets:
            for part, sizes in (("a", (target.in_features, config.rank)), ("b", (config.rank, target.out_features))):
                name = f"lora.{target.name}.{part}"
                self.tensors[name] = zeros((num_slots, *sizes), torch.float32, device)

    def load(self, slot: int, tensors: Mapping[str, np.ndarray]) -> None:
        """Put an adapter into ``slot`` (1…num_slots): graph input name → its matrix, without the slots' axis.

        Products that ``tensors`` does not name stay unchanged under this adapter. Raises InvalidRequest and then leaves
        the slot as it was.
        """
        if not 1 <= slot <= self.num_slots:
            raise InvalidRequest(f"slot has value {slot}; this model has adapter slots 1 to {self.num_slots}")
        for name, matrix in tensors.items():
            self._check(name, matrix)
        for name, stacked in self.tensors.items():
            stacked[slot] = torch.from_numpy(tensors[name]) if name in tensors else 0.0

    def set(self, row: int, slot: int) -> None:
        """``row`` computes with the adapter in ``slot`` from now on; 0 is none."""
        if not 0 <= slot <= self.num_slots:
            raise InvalidRequest(f"slot has value {slot}; this model has adapter slots 0 (none) to {self.num_slots}")
        if self._slots[row] != slot:
            self._slots[row] = slot
            self.adapter_ids[row] = slot

    def slot_of(self, row: int) -> int:
        return self._slots[row]

    def _check(self, name: str, matrix: np.ndarray) -> None:
        if name not in self.tensors:
            raise InvalidRequest(
                f"the adapter has a matrix {name!r}, which this model cannot change; it can change "
                f"{', '.join(self.tensors) or 'nothing'}"
            )
        expected = tuple(self.tensors[name].shape[1:])
        if matrix.shape != expected:
            raise InvalidRequest(f"the adapter's {name} has shape {matrix.shape}; this model expects {expected}")
        if matrix.dtype != np.float32:
            raise InvalidRequest(f"the adapter's {name} has type {matrix.dtype}; this model expects float32")
        if not np.isfinite(matrix).all():
            raise InvalidRequest(f"the adapter's {name} holds NaN or infinite values; train or convert it again")
