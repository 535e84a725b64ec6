"""Runs the decoder graph: prompt chunks on one row, decode steps over rows 0…n−1, both in place on the cache.

Everything ONNX Runtime reads or writes is preallocated and bound by pointer, so a decode step copies nothing; results
of row r lie in row r of ``outputs`` whichever run made them. With CUDA graphs a decode step is one launch; its number
of rows is rounded up to one that was captured. Owned by the engine thread. It knows rows, tokens and lengths, not
requests. Graph contract: ``input_ids``/``position_ids`` (B, S) int64, ``seqlens_k`` (B) int32 = total
length − 1, ``total_sequence_length`` int32 scalar, ``logits_index`` (N) int64 = b·S + s; outputs ``logits`` (N, V),
``top_logits``/``top_ids`` (N, K). With cross attention also ``cross.{i}.key/value`` (B, H, max_source_len, D) and
``source_lens`` (B) int32; with adapters ``adapter_ids`` (B) int64 and the matrices of adapter_slots.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime
import torch

from triton_backend.adapter_slots import AdapterSlots
from triton_backend.config import ModelConfig, VersionConfig
from triton_backend.encoder_runner import EncoderRunner
from triton_backend.errors import VersionFolderError
from triton_backend.kv_cache import CACHE_TYPES, CrossCache, KVCache, place_of, zeros
from triton_backend.session import load_session, new_stream, run_options, use_stream
from triton_backend.step_inputs import StepInputs

PRECISIONS = {"cpu": ("fp32", "fp16", "int8", "int4"), "cuda": ("fp16", "bf16", "int8", "int4")}
"""What weights may be kept in on each device."""
CACHES = {"cpu": ("fp32", "fp16"), "cuda": ("fp16", "bf16")}
"""What the attention kernels of each device take."""

QUERY_BLOCK = 16
"""Attention takes queries in blocks of a multiple of this, and a block of one query, like a run of one token, by
another path with other last bits. A token behind the last one, which the next real one overwrites, keeps every prompt
on one path, so that its keys and values never depend on how it was cut into chunks."""
CAPTURED_ROWS = (1, 2, 4)
"""Numbers of rows that CUDA graphs are captured for; after them every multiple of 8."""


class DecodeToken(NamedTuple):
    """The newest token of the sequence in ``row``, at ``position`` (0-based)."""

    row: int
    token_id: int
    position: int


class Outputs(NamedTuple):
    """What the last run of each row returned, indexed by row: (rows, V), (rows, K), (rows, K).

    ``logits`` of a row are fresh only if that run was asked for them; the sampler may change them in place.
    """

    logits: torch.Tensor
    top_logits: torch.Tensor
    top_ids: torch.Tensor

    def rows(self, first: int, num: int) -> Outputs:
        return Outputs(*(output[first : first + num] for output in self))


@dataclass(frozen=True)
class SavedRow:
    """A row that was copied out, with all that belongs to it; ``num_tokens`` positions."""

    num_tokens: int
    cache: list[torch.Tensor]
    cross: list[torch.Tensor]


class ModelRunner:
    """Owner of the sessions, the caches and the input and output buffers.

    On CUDA the thread that made a runner, or warmed it up, computes on its stream: one runner per thread.
    """

    def __init__(self, folder: Path, config: VersionConfig) -> None:
        model, engine = config.model, config.engine
        _check_runnable(folder, model, engine.device)
        self.num_rows = engine.max_num_seqs + 1  # the last row is the health probe's
        self._device = torch.device(engine.device)
        self._stream = new_stream(self._device)
        use_stream(self._stream)
        has_graphs = engine.cuda_graphs
        self._session = load_session(folder / model.graph, engine.num_threads, self._device, cuda_graphs=has_graphs)
        dtype = CACHE_TYPES[model.cache_type]
        self._cache = KVCache(model.layers, self.num_rows, engine.max_model_len, dtype, self._device)
        self._cross = CrossCache(
            model.cross_layers,
            self.num_rows,
            engine.max_source_len,
            _float_type(self._session, "cross.0.key"),
            self._device,
        )
        self._encoder: EncoderRunner | None = None
        if model.kind == "encoder_decoder":
            assert model.encoder_graph is not None
            encoder = folder / model.encoder_graph
            self._encoder = EncoderRunner(encoder, self._cross.tensors, engine.num_threads, self._device)
        self._adapters = AdapterSlots(model.lora, self.num_rows, self._device)
        self._lengths = np.zeros(self.num_rows, dtype=np.int64)
        self.outputs = self._new_outputs(self.num_rows, model)
        self._model = model
        self._step = StepInputs(self.num_rows, self._device, engine.max_model_len if has_graphs else None)
        self._captured_rows = captured_rows(self.num_rows) if has_graphs else ()
        self._step_runs: dict[tuple[int, bool], tuple[onnxruntime.IOBinding, onnxruntime.RunOptions]] = {}
        self._run_options = run_options()
        # ONNX Runtime computes with the lengths of sources on the host, too, and copies them there when they are bound.
        self._must_bind_again = self._device.type == "cuda" and bool(model.cross_layers)

    def warm_up(self) -> None:
        """Run every graph once and capture the decode steps; by the thread that will use the runner, and only by it."""
        use_stream(self._stream)
        if self._encoder is not None:
            self.encode(0, [0])
        self.prefill(0, [0], start=0, want_logits=True)
        self.free_row(0)
        for num_rows in self._captured_rows:
            for want_logits in (True, False):
                self._run_step(num_rows, want_logits)

    def encode(self, row: int, source_ids: Iterable[int]) -> None:
        """Run the encoder on a whole source text; the decoder's runs over ``row`` attend to it from now on."""
        assert self._encoder is not None, "only an encoder_decoder model has sources"
        self._cross.write(row, self._encoder.encode(source_ids))

    def prefill(self, row: int, token_ids: Iterable[int], start: int, want_logits: bool) -> None:
        """Compute prompt positions ``start``… of ``row``; the last one's outputs land in row ``row`` of ``outputs``."""
        ids = np.fromiter(token_ids, dtype=np.int64)
        self._run_row(row, ids, start, len(ids) - 1, self.outputs.rows(row, 1), want_logits)

    def prefill_positions(self, row: int, token_ids: Iterable[int], start: int) -> Outputs:
        """As ``prefill``, but returns the outputs of every position: (S, V), (S, K), (S, K)."""
        ids = np.fromiter(token_ids, dtype=np.int64)
        outputs = self._new_outputs(len(ids), self._model)
        self._run_row(row, ids, start, 0, outputs, want_logits=True)
        for kept, output in zip(self.outputs, outputs, strict=True):
            kept[row] = output[-1]
        return outputs

    def verify(self, row: int, token_ids: Iterable[int], start: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute positions ``start``… of ``row``; returns the top logits and ids (S, K) of every one."""
        ids = np.fromiter(token_ids, dtype=np.int64)
        outputs = self._new_outputs(len(ids), self._model)
        self._run_row(row, ids, start, 0, outputs, want_logits=False)
        return outputs.top_logits, outputs.top_ids

    def decode(self, tokens: Iterable[DecodeToken], want_logits: bool) -> None:
        """Compute one token for each named row, in one run over rows 0…highest.

        The other rows in that range are idle lanes: they compute token 0 just behind their own content, where the next
        real token will overwrite it.
        """
        tokens = tuple(tokens)
        num_rows = max(token.row for token in tokens) + 1
        num_rows = next((captured for captured in self._captured_rows if captured >= num_rows), num_rows)
        step = self._step
        step.wait()
        step.ids[:num_rows] = 0
        step.positions[:num_rows] = self._lengths[:num_rows]
        for row, token_id, position in tokens:
            step.ids[row] = token_id
            step.positions[row] = position
            self._lengths[row] = position + 1
        self._run_step(num_rows, want_logits)

    def copy_tokens(self, source: int, target: int, start: int, end: int) -> None:
        """Copy positions ``start``…``end − 1`` of the cache; ``target`` then holds ``end`` tokens."""
        self._cache.copy_tokens(source, target, start, end)
        self._lengths[target] = end

    def copy_row(self, source: int, target: int, num_tokens: int) -> None:
        """Copy a sequence's cache, source, choice of adapter and last outputs to another row."""
        self.copy_tokens(source, target, 0, num_tokens)
        self._cross.copy_row(source, target)
        self._adapters.set(target, self._adapters.slot_of(source))
        for output in self.outputs:
            output[target] = output[source]

    def copy_source(self, source: int, target: int) -> None:
        """``target`` attends to the source text of ``source``; nothing to do for a model without an encoder."""
        self._cross.copy_row(source, target)

    def save_row(self, row: int, num_tokens: int) -> SavedRow:
        """Copy a row out of the cache, bit for bit; its outputs are not kept."""
        return SavedRow(num_tokens, self._cache.save(row, num_tokens), self._cross.save(row))

    def restore_row(self, row: int, saved: SavedRow) -> None:
        self._cache.restore(row, saved.cache)
        self._cross.write(row, saved.cross)
        self._lengths[row] = saved.num_tokens

    def free_row(self, row: int, num_kept: int = 0) -> None:
        """The sequence in ``row`` is gone; the first ``num_kept`` positions may still be copied from."""
        self._lengths[row] = num_kept
        self._cross.clear_row(row)
        self._adapters.set(row, 0)

    def load_adapter(self, slot: int, tensors: Mapping[str, np.ndarray]) -> None:
        """Put a LoRA adapter into ``slot`` (1…): graph input name → matrix (in_features, rank) or (rank, out_features).

        No running row may use the slot. Raises InvalidRequest naming the matrix that does not fit.
        """
        self._adapters.load(slot, tensors)

    def set_adapter(self, row: int, slot: int) -> None:
        """``row`` computes with the adapter in ``slot``, 0 for none, until it is freed."""
        self._adapters.set(row, slot)

    def _run_row(
        self, row: int, ids: np.ndarray, start: int, first_position: int, outputs: Outputs, want_logits: bool
    ) -> None:
        """Compute ``ids`` (S) at ``start``… of ``row``; ``outputs`` are those of positions ``first_position``…S − 1."""
        num_new = len(ids)
        if num_new % QUERY_BLOCK == 1:
            ids = np.append(ids, 0)
        end = start + len(ids)
        host = {
            "input_ids": ids[None, :],
            "position_ids": np.arange(start, end, dtype=np.int64)[None, :],
            "seqlens_k": np.array([end - 1], dtype=np.int32),
            "logits_index": np.arange(first_position, num_new, dtype=np.int64),
        }
        inputs = {name: torch.from_numpy(array).to(self._device) for name, array in host.items()}
        inputs["total_sequence_length"] = torch.tensor(end, dtype=torch.int32)
        self._session.run_with_iobinding(self._bind(inputs, row, 1, outputs, want_logits), self._run_options)
        self._lengths[row] = start + num_new

    def _run_step(self, num_rows: int, want_logits: bool) -> None:
        """Compute what the step's inputs say of rows 0…num_rows − 1."""
        key = (num_rows, want_logits)
        self._step.upload(num_rows)
        if key not in self._step_runs or self._must_bind_again:
            outputs = self.outputs.rows(0, num_rows)
            binding = self._bind(self._step.tensors(num_rows), 0, num_rows, outputs, want_logits)
            graph_id = len(self._step_runs) + 1 if self._captured_rows else None
            self._step_runs[key] = (binding, run_options(graph_id))
        self._session.run_with_iobinding(*self._step_runs[key])

    def _bind(
        self, inputs: Mapping[str, torch.Tensor], first_row: int, num_rows: int, outputs: Outputs, want_logits: bool
    ) -> onnxruntime.IOBinding:
        """Bind ``inputs``, the cache rows (past and present at one address) and ``outputs``, all by pointer."""
        binding = self._session.io_binding()
        rows = slice(first_row, first_row + num_rows)
        inputs = {**inputs, **self._adapters.tensors}
        if self._adapters.tensors:
            inputs["adapter_ids"] = self._adapters.adapter_ids[rows]
        if self._cross.tensors:
            inputs["source_lens"] = self._cross.source_lens[rows]
        inputs |= {f"cross.{tensor.name}": tensor.data[rows] for tensor in self._cross.tensors}
        for name, value in inputs.items():
            binding.bind_input(name, *place_of(value))
        for tensor in self._cache.tensors:
            place = place_of(tensor.data[rows])
            binding.bind_input(f"past_key_values.{tensor.name}", *place)
            binding.bind_output(f"present.{tensor.name}", *place)
        for name, output in outputs._asdict().items():
            if name != "logits" or want_logits:
                binding.bind_output(name, *place_of(output))
        return binding

    def _new_outputs(self, num: int, model: ModelConfig) -> Outputs:
        return Outputs(
            zeros((num, model.vocab_size), torch.float32, self._device),
            zeros((num, model.num_top_logits), torch.float32, self._device),
            zeros((num, model.num_top_logits), torch.int64, self._device),
        )


def captured_rows(num_rows: int) -> tuple[int, ...]:
    """Numbers of rows to capture decode steps for, so that few idle rows are computed and few graphs are kept."""
    return (*(n for n in (*CAPTURED_ROWS, *range(8, num_rows, 8)) if n < num_rows), num_rows)


def _check_runnable(folder: Path, model: ModelConfig, device: str) -> None:
    """Raise VersionFolderError with the reason if this engine cannot run such a model on ``device``."""
    if model.kind == "encoder":
        raise VersionFolderError(
            f"{folder} is an encoder ({model.architecture}): it gives embeddings and generates no text, but "
            "this engine serves generation only; embeddings are not served yet"
        )
    if model.precision not in PRECISIONS[device]:
        raise VersionFolderError(
            f"{folder} has precision {model.precision!r}, but ONNX Runtime's {device.upper()} kernels compute in "
            f"{', '.join(PRECISIONS[device])} only; export the model with one of these"
        )
    if model.cache_type not in CACHES[device]:
        raise VersionFolderError(
            f"{folder} has cache_type {model.cache_type!r}, but ONNX Runtime's attention on {device.upper()} takes "
            f"{', '.join(CACHES[device])} only; export the model with a precision that keeps one of these"
        )


def _float_type(session: onnxruntime.InferenceSession, name: str) -> torch.dtype:
    """The type of a float input of the graph."""
    types = {value.name: value.type for value in session.get_inputs()}
    return {"tensor(float16)": torch.float16, "tensor(bfloat16)": torch.bfloat16}.get(
        types.get(name, ""), torch.float32
    )
