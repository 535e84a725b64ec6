"""Runs the decoder graph: prompt chunks on one row, decode steps over rows 0…n−1, both in place on the cache.

Everything ONNX Runtime reads or writes is preallocated and bound by pointer, so a decode step copies nothing; results
of row r lie in row r of ``outputs`` whichever run made them. Owned by the engine thread. It knows rows, tokens and
lengths, not requests. Graph contract: ``input_ids``/``position_ids`` (B, S) int64, ``seqlens_k`` (B) int32 = total
length − 1, ``total_sequence_length`` int32 scalar, ``logits_index`` (B) int64; outputs ``logits`` (B, V),
``top_logits``/``top_ids`` (B, K). With cross attention also ``cross.{i}.key/value`` (B, H, max_source_len, D) and
``source_lens`` (B) int32; with adapters ``adapter_ids`` (B) int64 and the matrices of adapter_slots.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import torch

from triton_backend.adapter_slots import AdapterSlots
from triton_backend.config import ModelConfig, VersionConfig
from triton_backend.encoder_runner import EncoderRunner
from triton_backend.errors import VersionFolderError
from triton_backend.kv_cache import ELEMENT_TYPES, CrossCache, KVCache
from triton_backend.session import load_session

PRECISIONS = ("fp32", "fp16", "int8", "int4")
"""What weights may be kept in on CPU."""


class DecodeToken(NamedTuple):
    """The newest token of the sequence in ``row``, at ``position`` (0-based)."""

    row: int
    token_id: int
    position: int


class Outputs(NamedTuple):
    """What the last run of each row returned, indexed by row: (rows, V), (rows, K), (rows, K).

    ``logits`` of a row are fresh only if that run was asked for them.
    """

    logits: torch.Tensor
    top_logits: torch.Tensor
    top_ids: torch.Tensor


class ModelRunner:
    """Owner of the sessions, the caches and the input and output buffers."""

    def __init__(self, folder: Path, config: VersionConfig) -> None:
        model, engine = config.model, config.engine
        _check_runnable(folder, model)
        self.num_rows = engine.max_num_seqs + 1  # the last row is the health probe's
        self._session = load_session(folder / model.graph, engine.num_threads)
        self._cache = KVCache(model.layers, self.num_rows, engine.max_model_len, ELEMENT_TYPES[model.cache_type])
        self._cross = CrossCache(
            model.cross_layers, self.num_rows, engine.max_source_len, _element_type(self._session, "cross.0.key")
        )
        self._encoder: EncoderRunner | None = None
        if model.kind == "encoder_decoder":
            assert model.encoder_graph is not None
            names = [f"cross.{tensor.name}" for tensor in self._cross.tensors]
            self._encoder = EncoderRunner(folder / model.encoder_graph, names, engine.num_threads)
        self._adapters = AdapterSlots(model.lora, self.num_rows)
        self._lengths = np.zeros(self.num_rows, dtype=np.int64)
        self.outputs = Outputs(
            torch.from_numpy(np.zeros((self.num_rows, model.vocab_size), dtype=np.float32)),
            torch.zeros((self.num_rows, model.num_top_logits), dtype=torch.float32),
            torch.zeros((self.num_rows, model.num_top_logits), dtype=torch.int64),
        )
        self._step_ids = np.zeros((self.num_rows, 1), dtype=np.int64)
        self._step_positions = np.zeros((self.num_rows, 1), dtype=np.int64)
        self._step_seqlens = np.zeros(self.num_rows, dtype=np.int32)
        self._step_total = np.zeros((), dtype=np.int32)
        self._step_index = np.zeros(self.num_rows, dtype=np.int64)
        self._step_bindings: dict[tuple[int, bool], onnxruntime.IOBinding] = {}

    def encode(self, row: int, source_ids: Iterable[int]) -> None:
        """Run the encoder on a whole source text; the decoder's runs over ``row`` attend to it from now on."""
        assert self._encoder is not None, "only an encoder_decoder model has sources"
        self._cross.write(row, self._encoder.encode(source_ids))

    def prefill(self, row: int, token_ids: Iterable[int], start: int, want_logits: bool) -> None:
        """Compute prompt positions ``start``… of ``row``; the last one's outputs land in row ``row`` of ``outputs``."""
        ids = np.fromiter(token_ids, dtype=np.int64)[None, :]
        num_new = ids.shape[1]
        end = start + num_new
        inputs: dict[str, np.ndarray] = {
            "input_ids": ids,
            "position_ids": np.arange(start, end, dtype=np.int64)[None, :],
            "seqlens_k": np.array([end - 1], dtype=np.int32),
            "total_sequence_length": np.array(end, dtype=np.int32),
            "logits_index": np.array([num_new - 1], dtype=np.int64),
        }
        self._session.run_with_iobinding(self._bind(inputs, row, 1, want_logits))
        self._lengths[row] = end

    def decode(self, tokens: Iterable[DecodeToken], want_logits: bool) -> None:
        """Compute one token for each named row, in one run over rows 0…highest.

        The other rows in that range are idle lanes: they compute token 0 just behind their own content, where the next
        real token will overwrite it.
        """
        tokens = tuple(tokens)
        num_rows = max(token.row for token in tokens) + 1
        self._step_ids[:num_rows] = 0
        self._step_positions[:num_rows, 0] = self._lengths[:num_rows]
        for row, token_id, position in tokens:
            self._step_ids[row, 0] = token_id
            self._step_positions[row, 0] = position
            self._lengths[row] = position + 1
        self._step_seqlens[:num_rows] = self._step_positions[:num_rows, 0]
        self._step_total[...] = self._step_seqlens[:num_rows].max() + 1
        self._session.run_with_iobinding(self._step_binding(num_rows, want_logits))

    def copy_row(self, source: int, target: int, num_tokens: int) -> None:
        """Copy a sequence's cache, source, choice of adapter and last outputs to another row."""
        self._cache.copy_row(source, target, num_tokens)
        self._cross.copy_row(source, target)
        self._adapters.set(target, int(self._adapters.adapter_ids[source]))
        self._lengths[target] = num_tokens
        for output in self.outputs:
            output[target] = output[source]

    def clear_row(self, row: int) -> None:
        """Nothing in ``row`` is of use any more."""
        self._lengths[row] = 0
        self._cross.clear_row(row)
        self._adapters.set(row, 0)

    def load_adapter(self, slot: int, tensors: Mapping[str, np.ndarray]) -> None:
        """Put a LoRA adapter into ``slot`` (1…): graph input name → matrix (in_features, rank) or (rank, out_features).

        No running row may use the slot. Raises InvalidRequest naming the matrix that does not fit.
        """
        self._adapters.load(slot, tensors)

    def set_adapter(self, row: int, slot: int) -> None:
        """``row`` computes with the adapter in ``slot``, 0 for none, until it is cleared."""
        self._adapters.set(row, slot)

    def _step_binding(self, num_rows: int, want_logits: bool) -> onnxruntime.IOBinding:
        key = (num_rows, want_logits)
        if key not in self._step_bindings:
            inputs: dict[str, np.ndarray] = {
                "input_ids": self._step_ids[:num_rows],
                "position_ids": self._step_positions[:num_rows],
                "seqlens_k": self._step_seqlens[:num_rows],
                "total_sequence_length": self._step_total,
                "logits_index": self._step_index[:num_rows],
            }
            self._step_bindings[key] = self._bind(inputs, 0, num_rows, want_logits)
        return self._step_bindings[key]

    def _bind(
        self, inputs: dict[str, np.ndarray], first_row: int, num_rows: int, want_logits: bool
    ) -> onnxruntime.IOBinding:
        """Bind ``inputs``, the cache rows (past and present at one address) and the output rows, all by pointer."""
        binding = self._session.io_binding()
        rows = slice(first_row, first_row + num_rows)
        inputs = {**inputs, **self._adapters.tensors}
        if self._adapters.tensors:
            inputs["adapter_ids"] = self._adapters.adapter_ids[rows]
        if self._cross.tensors:
            inputs["source_lens"] = self._cross.source_lens[rows]
        for name, array in inputs.items():
            binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        for tensor in self._cross.tensors:
            binding.bind_input(f"cross.{tensor.name}", *tensor.place(first_row, num_rows))
        for tensor in self._cache.tensors:
            binding.bind_input(f"past_key_values.{tensor.name}", *tensor.place(first_row, num_rows))
            binding.bind_output(f"present.{tensor.name}", *tensor.place(first_row, num_rows))
        for name, data in self.outputs._asdict().items():
            if name != "logits" or want_logits:
                element_type = np.int64 if data.dtype == torch.int64 else np.float32
                shape = (num_rows, data.shape[1])
                binding.bind_output(name, "cpu", 0, element_type, shape, data[first_row].data_ptr())
        return binding


def _check_runnable(folder: Path, model: ModelConfig) -> None:
    """Raise VersionFolderError with the reason if this engine cannot run such a model on CPU."""
    if model.kind == "encoder":
        raise VersionFolderError(
            f"{folder} is an encoder ({model.architecture}): it gives embeddings and generates no text, but "
            "this engine serves generation only; embeddings are not served yet"
        )
    if model.precision not in PRECISIONS:
        raise VersionFolderError(
            f"{folder} has precision {model.precision!r}, but ONNX Runtime's CPU kernels compute in "
            f"{', '.join(PRECISIONS)} only; export the model with one of these"
        )
    if model.cache_type not in ELEMENT_TYPES:
        raise VersionFolderError(
            f"{folder} has cache_type {model.cache_type!r}, but ONNX Runtime's attention on CPU takes "
            f"{', '.join(ELEMENT_TYPES)} only; export the model with a precision that keeps one of these"
        )


def _element_type(session: onnxruntime.InferenceSession, name: str) -> Any:
    """NumPy's type of a float input of the graph."""
    types = {value.name: value.type for value in session.get_inputs()}
    return np.float16 if types.get(name) == "tensor(float16)" else np.float32
