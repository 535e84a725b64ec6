"""Logits, from the exported graph in ONNX Runtime and from the original in PyTorch; no token is left out of them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from transformers import PreTrainedModel

from exporters.session import open_session
from triton_backend.config import VersionConfig

CHUNK_LOGITS_BYTES = 64 << 20
"""Logits of all positions are asked for in chunks of about this size."""
NUMPY_TYPES = {"float": np.float32, "float16": np.float16, "int64": np.int64, "int32": np.int32}


class ExportedGraph:
    """The decoder of a version folder. Owned by the thread that made it.

    Adapter inputs, if the graph has any, are fed with zeros: no adapter.
    """

    def __init__(self, folder: Path, config: VersionConfig) -> None:
        self._config = config
        options = ort.SessionOptions()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # PyTorch runs beside it
        options.enable_cpu_mem_arena = False  # an arena grows to more than is in use and is kept
        device = config.engine.device
        self._session = open_session(folder / config.model.graph, device, options)
        self._encoder = None
        if config.model.encoder_graph:
            self._encoder = open_session(folder / config.model.encoder_graph, device, ort.SessionOptions())
        self._inputs = {node.name: node for node in self._session.get_inputs()}

    def at(self, ids: Sequence[int], index: Sequence[int], source: Sequence[int] = ()) -> np.ndarray:
        """Logits (N, V) of the N positions ``index`` of ``ids``, computed in one run over one row."""
        return self._run(np.array([ids], np.int64), 0, index, self._state(1, len(ids), source))

    def chunks(self, ids: Sequence[int], source: Sequence[int] = ()) -> Iterator[np.ndarray]:
        """Logits of every position of ``ids``, in order, as arrays (S, V); chunks are appended to one cache row."""
        size = max(2, CHUNK_LOGITS_BYTES // (4 * self._config.model.vocab_size))
        if self._encoder is not None:  # the graph takes no more new tokens at once than a source has room for
            size = min(size, self._config.engine.max_source_len - 1)
        starts = list(range(0, len(ids), size))
        if len(starts) > 1 and len(ids) - starts[-1] == 1:
            starts.pop()  # a chunk of one token would take the decode path
        state = self._state(1, len(ids), source)
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            yield self._run(np.array([ids[start:end]], np.int64), start, range(end - start), state)

    def _run(self, ids: np.ndarray, start: int, index: Sequence[int], state: dict[str, ort.OrtValue]) -> np.ndarray:
        num_rows, num_tokens = ids.shape
        end = start + num_tokens
        inputs = {
            "input_ids": ids,
            "position_ids": np.tile(np.arange(start, end, dtype=np.int64), (num_rows, 1)),
            "seqlens_k": np.full(num_rows, end - 1, np.int32),
            "total_sequence_length": np.array(end, np.int32),
            "logits_index": np.array(index, np.int64),
        }
        binding = self._session.io_binding()
        for name, value in inputs.items():
            if name in self._inputs:
                binding.bind_cpu_input(name, value)
        for name, value in state.items():
            binding.bind_ortvalue_input(name, value)
            if name.startswith("past_key_values."):
                binding.bind_ortvalue_output(name.replace("past_key_values", "present"), value)
        binding.bind_output("logits")
        self._session.run_with_iobinding(binding)
        logits: np.ndarray = binding.get_outputs()[-1].numpy()
        return logits

    def _state(self, num_rows: int, max_len: int, source: Sequence[int]) -> dict[str, ort.OrtValue]:
        """Everything that is fed besides the tokens: an empty cache, what the encoder made of ``source``, adapters."""
        state = self._encoded(num_rows, source) if self._encoder is not None else {}
        for name, node in self._inputs.items():
            if name.startswith("past_key_values."):
                state[name] = _zeros((num_rows, node.shape[1], max_len, node.shape[3]), node.type)
            elif name == "adapter_ids":
                state[name] = _zeros((num_rows,), node.type)
            elif name.startswith("lora."):
                state[name] = _zeros(self._lora_shape(name), node.type)
        return state

    def _encoded(self, num_rows: int, source: Sequence[int]) -> dict[str, ort.OrtValue]:
        assert self._encoder is not None
        ids = np.tile(np.array(source, np.int64), (num_rows, 1))
        names = [output.name for output in self._encoder.get_outputs()]
        fed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        known = {node.name for node in self._encoder.get_inputs()}
        values = self._encoder.run_with_ort_values(
            names, {name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in fed.items() if name in known}
        )
        lengths = ort.OrtValue.ortvalue_from_numpy(np.full(num_rows, len(source), np.int32))
        return {
            **{name: self._padded(value) for name, value in zip(names, values, strict=True)},
            "source_lens": lengths,
        }

    def _padded(self, encoded: ort.OrtValue) -> ort.OrtValue:
        """Keys or values (B, KV, S, D) in a buffer of max_source_len, as the engine's are."""
        found = encoded.numpy()
        shape = (*found.shape[:2], self._config.engine.max_source_len, found.shape[3])
        buffer = np.zeros(shape, found.dtype)
        buffer[:, :, : found.shape[2]] = found
        return ort.OrtValue.ortvalue_from_numpy(buffer)

    def _lora_shape(self, name: str) -> tuple[int, int, int]:
        lora = self._config.model.lora
        assert lora is not None, f"{name} is an input, but model.json names no adapters"
        target = next(target for target in lora.targets if name.startswith(f"lora.{target.name}."))
        if name.endswith(".a"):
            return (lora.num_slots + 1, target.in_features, lora.rank)
        return (lora.num_slots + 1, lora.rank, target.out_features)


def original_logits(
    model: PreTrainedModel, ids: Sequence[int], source: Sequence[int] = (), keep: int | None = None
) -> torch.Tensor:
    """Logits (S, V) of the last ``keep`` positions of ``ids`` (all by default), in one forward pass."""
    inputs: dict[str, Any] = {"input_ids": torch.tensor([ids])}
    if source:
        inputs = {"input_ids": torch.tensor([source]), "decoder_input_ids": torch.tensor([ids])}
    if keep is not None and _can_keep(model):
        inputs["logits_to_keep"] = keep
    forward: Any = model
    with torch.no_grad():
        logits: torch.Tensor = forward(**inputs, use_cache=False).logits[0].float()
    return logits if keep is None else logits[-keep:]


def _can_keep(model: PreTrainedModel) -> bool:
    """Whether the model can leave out the head's product for positions that nobody asks for."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def _zeros(shape: Sequence[int], onnx_type: str) -> ort.OrtValue:
    """Zeros of a graph input's type, such as ``tensor(float16)``."""
    name = onnx_type.removeprefix("tensor(").removesuffix(")")
    if name == "bfloat16":  # numpy has none
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(np.zeros(shape, np.uint16), ir.DataType.BFLOAT16.value)
    return ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, NUMPY_TYPES[name]))
