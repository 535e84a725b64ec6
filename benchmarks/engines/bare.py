"""llmos's own graph run by nothing but ONNX Runtime: one run per prompt, one per decode step, no engine around them.

The tokens a second that this makes are the limit for whatever serves the same graph. It reads the version folder of
llmos and binds everything by pointer once per number of rows; greedy tokens are the first of the graph's ``top_ids``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.engines import Limits, Unavailable
from benchmarks.engines.closed_loop import ClosedLoop, Serve

SERVED_BY = "bare runs, static batches"
RUNS_BATCHES = True


def serve(checkpoint: Path, folder: Path, precision: str, limits: Limits) -> Serve:
    graph = BareGraph(folder, limits)

    def serve_batches(loop: ClosedLoop) -> None:
        while not loop.is_done:
            batch = list(loop.arrivals())
            for row, arrival in enumerate(batch):
                loop.token(arrival.index, graph.prefill(row, arrival.prompt))
            for _ in range(loop.num_new - 1):
                for arrival, token in zip(batch, graph.step(len(batch)), strict=True):
                    loop.token(arrival.index, token)

    return serve_batches


class BareGraph:
    """The session and the memory it works on: caches (rows, KV, max_tokens, D), one row per sequence."""

    def __init__(self, folder: Path, limits: Limits) -> None:
        from triton_backend.config import VersionConfig
        from triton_backend.errors import VersionFolderError
        from triton_backend.session import load_session

        try:
            config = VersionConfig.read(folder)
            self._session = load_session(folder / config.model.graph, limits.num_threads)
        except VersionFolderError as error:
            raise Unavailable(f"the version cannot be read: {error}") from error
        rows, length = limits.max_rows, limits.max_tokens
        self._cache = {
            f"{index}.{kind}": np.zeros((rows, layer.num_kv_heads, length, layer.head_size), dtype=np.float32)
            for index, layer in enumerate(config.model.layers)
            for kind in ("key", "value")
        }
        width = config.model.num_top_logits
        self._outputs: dict[str, np.ndarray] = {
            "top_logits": np.zeros((rows, width), dtype=np.float32),
            "top_ids": np.zeros((rows, width), dtype=np.int64),
        }
        self._lengths = np.zeros((rows, 1), dtype=np.int64)
        self._newest = np.zeros((rows, 1), dtype=np.int64)
        self._seqlens = np.zeros(rows, dtype=np.int32)
        self._total = np.zeros((), dtype=np.int32)
        self._index = np.arange(rows, dtype=np.int64)  # of the (rows, 1) new tokens, all
        self._steps: dict[int, Any] = {}

    def prefill(self, row: int, prompt: Sequence[int]) -> int:
        """Compute a whole prompt in ``row``; returns the greedy token after it."""
        length = len(prompt)
        inputs: dict[str, np.ndarray] = {
            "input_ids": np.array([prompt], dtype=np.int64),
            "position_ids": np.arange(length, dtype=np.int64)[None, :],
            "seqlens_k": np.array([length - 1], dtype=np.int32),
            "total_sequence_length": np.array(length, dtype=np.int32),
            "logits_index": np.array([length - 1], dtype=np.int64),
        }
        self._session.run_with_iobinding(self._bind(inputs, row, 1))
        self._lengths[row] = length
        self._newest[row] = self._outputs["top_ids"][row, 0]
        return int(self._newest[row, 0])

    def step(self, num_rows: int) -> list[int]:
        """Compute the newest token of rows 0…num_rows − 1; returns the greedy token after each."""
        self._seqlens[:num_rows] = self._lengths[:num_rows, 0]
        self._total[...] = self._seqlens[:num_rows].max() + 1
        self._session.run_with_iobinding(self._step(num_rows))
        self._lengths[:num_rows] += 1
        self._newest[:num_rows, 0] = self._outputs["top_ids"][:num_rows, 0]
        tokens: list[int] = self._newest[:num_rows, 0].tolist()
        return tokens

    def _step(self, num_rows: int) -> Any:
        if num_rows not in self._steps:
            inputs: dict[str, np.ndarray] = {
                "input_ids": self._newest[:num_rows],
                "position_ids": self._lengths[:num_rows],
                "seqlens_k": self._seqlens[:num_rows],
                "total_sequence_length": self._total,
                "logits_index": self._index[:num_rows],
            }
            self._steps[num_rows] = self._bind(inputs, 0, num_rows)
        return self._steps[num_rows]

    def _bind(self, inputs: dict[str, np.ndarray], first_row: int, num_rows: int) -> Any:
        binding, rows = self._session.io_binding(), slice(first_row, first_row + num_rows)
        for name, array in inputs.items():
            binding.bind_input(name, *_place(array))
        for name, array in self._cache.items():
            binding.bind_input(f"past_key_values.{name}", *_place(array[rows]))
            binding.bind_output(f"present.{name}", *_place(array[rows]))
        for name, array in self._outputs.items():
            binding.bind_output(name, *_place(array[rows]))
        return binding


def _place(array: np.ndarray) -> tuple[Any, ...]:
    return ("cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
