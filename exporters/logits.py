"""Logits of single positions, from the exported graph in ONNX Runtime and from the original in PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Position:
    """Token ``index`` of the prompt ``ids``."""

    ids: tuple[int, ...]
    index: int


def exported_logits(graph: Path, positions: Sequence[Position]) -> list[np.ndarray]:
    """Logits (V,) of each position; every one is a prefill of its prompt into one empty cache row."""
    session = ort.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    caches = {node.name: node.shape for node in session.get_inputs() if node.name.startswith("past_key_values.")}
    found = []
    for position in positions:
        num_tokens = len(position.ids)
        inputs = {
            "input_ids": np.array([position.ids], np.int64),
            "position_ids": np.arange(num_tokens, dtype=np.int64)[None],
            "seqlens_k": np.array([num_tokens - 1], np.int32),
            "total_sequence_length": np.array(num_tokens, np.int32),
            "logits_index": np.array([position.index], np.int64),
        }
        binding = session.io_binding()
        for name, value in inputs.items():
            binding.bind_cpu_input(name, value)
        for name, (_, num_kv_heads, _, head_size) in caches.items():
            cache = ort.OrtValue.ortvalue_from_numpy(np.zeros((1, num_kv_heads, num_tokens, head_size), np.float32))
            binding.bind_ortvalue_input(name, cache)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), cache)
        binding.bind_output("logits")
        session.run_with_iobinding(binding)
        found.append(binding.get_outputs()[-1].numpy()[0])
    return found


def original_logits(model: PreTrainedModel, positions: Sequence[Position]) -> list[np.ndarray]:
    """Logits (V,) of each position; positions of one prompt share its forward pass."""
    found: list[np.ndarray] = []
    ids: tuple[int, ...] = ()
    with torch.no_grad():
        for position in positions:
            if position.ids != ids:
                ids = position.ids
                logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float().numpy()
            found.append(logits[position.index].copy())
    return found
