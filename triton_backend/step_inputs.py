"""The inputs of decode steps, at addresses that never change: written on the host, read by the graph on its device.

On CPU both are the same memory. Owned by the model runner. ``total`` is read by the attention's launcher, so it stays
on the host; a captured launch is repeated as it was, so there it is the longest length that may come.
"""

from __future__ import annotations

import numpy as np
import torch


class StepInputs:
    """One entry per cache row; ``upload`` makes the first ``num_rows`` visible to the graph.

    ``fixed_total`` is what ``total_sequence_length`` always is; None: the longest length of each step.
    """

    def __init__(self, num_rows: int, device: torch.device, fixed_total: int | None = None) -> None:
        self._is_shared = device.type == "cpu"
        self._uploaded = None if self._is_shared else torch.cuda.Event()
        pin = not self._is_shared
        self._host = {
            "input_ids": torch.zeros((num_rows, 1), dtype=torch.int64, pin_memory=pin),
            "position_ids": torch.zeros((num_rows, 1), dtype=torch.int64, pin_memory=pin),
            "seqlens_k": torch.zeros(num_rows, dtype=torch.int32, pin_memory=pin),
        }
        self._device = self._host if self._is_shared else {name: host.to(device) for name, host in self._host.items()}
        self._logits_index = torch.arange(num_rows, device=device)
        self._is_total_fixed = fixed_total is not None
        self.total = torch.full((), fixed_total or 0, dtype=torch.int32)
        self.ids: np.ndarray = self._host["input_ids"].numpy()[:, 0]
        self.positions: np.ndarray = self._host["position_ids"].numpy()[:, 0]
        self._seqlens: np.ndarray = self._host["seqlens_k"].numpy()

    def wait(self) -> None:
        """Return when the device has what was uploaded last, so that the host may write again."""
        if self._uploaded is not None:
            self._uploaded.synchronize()

    def upload(self, num_rows: int) -> None:
        """Derive lengths from positions, then hand everything to the device."""
        self._seqlens[:num_rows] = self.positions[:num_rows]
        if not self._is_total_fixed:
            self.total.fill_(int(self._seqlens[:num_rows].max()) + 1)
        if self._uploaded is not None:
            for name, host in self._host.items():
                self._device[name][:num_rows].copy_(host[:num_rows], non_blocking=True)
            self._uploaded.record()

    def tensors(self, num_rows: int) -> dict[str, torch.Tensor]:
        """What the graph reads for rows 0…num_rows − 1, by input name."""
        inputs = {name: tensor[:num_rows] for name, tensor in self._device.items()}
        return {**inputs, "total_sequence_length": self.total, "logits_index": self._logits_index[:num_rows]}
