"""Runs the decoder graph: prompt chunks on one row, decode steps over rows 0…n−1, both in place on the cache.

Everything ONNX Runtime reads or writes is preallocated and bound by pointer, so a decode step copies nothing; results
of row r lie in row r of ``outputs`` whichever run made them. Owned by the engine thread. It knows rows, tokens and
lengths, not requests. Graph contract: ``input_ids``/``position_ids`` (B, S) int64, ``seqlens_k`` (B) int32 = total
length − 1, ``total_sequence_length`` int32 scalar, ``logits_index`` (B) int64; outputs ``logits`` (B, V),
``top_logits``/``top_ids`` (B, K).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime
import psutil
import torch

from triton_backend.config import VersionConfig
from triton_backend.errors import VersionFolderError
from triton_backend.kv_cache import KVCache


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
    """Owner of the session, the cache and the input and output buffers."""

    def __init__(self, folder: Path, config: VersionConfig) -> None:
        model, engine = config.model, config.engine
        if model.precision != "fp32":
            raise VersionFolderError(f"{folder} has precision {model.precision!r}; this engine runs 'fp32'")
        self.num_rows = engine.max_num_seqs + 1  # the last row is the health probe's
        self._session = _load_session(folder / model.graph, engine.num_threads)
        self._cache = KVCache(model.layers, self.num_rows, engine.max_model_len)
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
        """Copy a sequence's cache and last outputs to another row."""
        self._cache.copy_row(source, target, num_tokens)
        self._lengths[target] = num_tokens
        for output in self.outputs:
            output[target] = output[source]

    def clear_row(self, row: int) -> None:
        """Nothing in ``row`` is of use any more."""
        self._lengths[row] = 0

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
        for name, array in inputs.items():
            binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        for tensor in self._cache.tensors:
            place = ("cpu", 0, np.float32, tensor.shape(num_rows), tensor.pointer(first_row))
            binding.bind_input(f"past_key_values.{tensor.name}", *place)
            binding.bind_output(f"present.{tensor.name}", *place)
        for name, data in self.outputs._asdict().items():
            if name != "logits" or want_logits:
                element_type = np.int64 if data.dtype == torch.int64 else np.float32
                shape = (num_rows, data.shape[1])
                binding.bind_output(name, "cpu", 0, element_type, shape, data[first_row].data_ptr())
        return binding


def _load_session(path: Path, num_threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads or psutil.cpu_count(logical=False) or 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions share no public base class
        raise VersionFolderError(f"ONNX Runtime cannot load {path}: {error}") from error
