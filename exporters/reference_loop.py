"""Greedy decoding over the exported graph in the slowest, most obvious way: the truth that the graph is tested with.

Cache rows live in one numpy buffer per layer; past and present are bound to the same address, rows 0…n−1 run together
when they decode, and a prompt is prefilled over its own row's view, in chunks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from transformers import GenerationConfig

from exporters.decoder import measure, trace
from exporters.fusions import fuse
from exporters.graph import GraphSize, graph_size, save_graph

MAX_POSITIONS = 64


def export_graph(model: Any, folder: Path, *, fused: bool = True) -> Path:
    """The decoder graph of ``model`` as an export writes it, for rows of up to MAX_POSITIONS tokens."""
    return export_with_size(model, folder, fused=fused)[0]


def export_with_size(model: Any, folder: Path, *, fused: bool = True) -> tuple[Path, GraphSize]:
    program = trace(model, measure(model).layers, 64)
    if fused:
        fuse(program.model, MAX_POSITIONS)
    size = graph_size(program.model)
    folder.mkdir(exist_ok=True)
    save_graph(program, folder / "model.onnx")
    return folder / "model.onnx", size


def generate(model: Any, prompt: Sequence[int], num_new: int) -> list[int]:
    """Greedy tokens of the original."""
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=num_new, pad_token_id=0)
    ids = torch.tensor([prompt])
    with torch.no_grad():
        return model.generate(ids, attention_mask=torch.ones_like(ids))[0, len(prompt) :].tolist()


class GraphLoop:
    """Runs ``model.onnx`` over ``num_rows`` cache rows of ``max_len`` tokens.

    ``extra_inputs`` are bound as they are; those in ``extra_row_inputs`` have one entry per cache row.
    """

    def __init__(
        self,
        path: Path,
        num_rows: int,
        max_len: int,
        *,
        extra_inputs: Mapping[str, np.ndarray] | None = None,
        extra_row_inputs: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        types = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        self.caches = {
            value.name: np.zeros((num_rows, value.shape[1], max_len, value.shape[3]), types[value.type])
            for value in self.session.get_inputs()
            if value.name.startswith("past_key_values.")
        }
        self.max_len = max_len
        self.extra_inputs = dict(extra_inputs or {})
        self.extra_row_inputs = dict(extra_row_inputs or {})

    def run(
        self, first_row: int, ids: np.ndarray, lengths: Sequence[int], logits_index: Sequence[int] | None = None
    ) -> dict[str, np.ndarray]:
        """Append ``ids`` (B, S) to the rows from ``first_row`` on, which hold ``lengths`` tokens.

        Returns the logits of the flat positions ``logits_index``; without it, of the last one of each row.
        """
        num_rows, num_tokens = ids.shape
        positions = logits_index or [row * num_tokens + num_tokens - 1 for row in range(num_rows)]
        past = np.asarray(lengths)
        binding = self.session.io_binding()
        inputs = {
            "input_ids": ids.astype(np.int64),
            "position_ids": (past[:, None] + np.arange(num_tokens)).astype(np.int64),
            "seqlens_k": (past + num_tokens - 1).astype(np.int32),
            "total_sequence_length": np.array(past.max() + num_tokens, np.int32),
            "logits_index": np.array(positions, np.int64),
            **self.row_inputs(slice(first_row, first_row + num_rows)),
            **self.extra_inputs,
            **{name: rows[first_row : first_row + num_rows] for name, rows in self.extra_row_inputs.items()},
        }
        for name, value in inputs.items():
            binding.bind_cpu_input(name, value)
        for name, cache in self.caches.items():
            rows = cache[first_row : first_row + num_rows]
            binding.bind_input(name, "cpu", 0, cache.dtype, rows.shape, rows.ctypes.data)
            present = name.replace("past_key_values", "present")
            binding.bind_output(present, "cpu", 0, cache.dtype, rows.shape, rows.ctypes.data)
        names = ("logits", "top_logits", "top_ids")
        for name in names:
            binding.bind_output(name)
        self.session.run_with_iobinding(binding)
        by_name = dict(zip(self._output_names(), binding.get_outputs(), strict=True))
        return {name: by_name[name].numpy() for name in names}

    def row_inputs(self, rows: slice) -> dict[str, np.ndarray]:
        """Inputs of ``rows`` that stay the same from step to step; a decoder has none."""
        return {}

    def _output_names(self) -> list[str]:
        presents = [name.replace("past_key_values", "present") for name in self.caches]
        return [*presents, "logits", "top_logits", "top_ids"]

    def prefill(self, row: int, prompt: Sequence[int], chunks: Sequence[int]) -> int:
        """Prefill ``prompt`` into ``row`` in chunks of the given sizes and return the first new token."""
        assert sum(chunks) == len(prompt)
        done, token = 0, -1
        for size in chunks:
            result = self.run(row, np.array([prompt[done : done + size]]), [done])
            done, token = done + size, int(result["top_ids"][0, 0])
        return token

    def greedy(
        self, prompts: Sequence[Sequence[int]], chunks: Sequence[Sequence[int]], num_new: int
    ) -> list[list[int]]:
        """Tokens of all ``prompts``, decoded together in rows 0…n−1."""
        tokens = [[self.prefill(row, prompt, chunks[row])] for row, prompt in enumerate(prompts)]
        lengths = [len(prompt) for prompt in prompts]
        while len(tokens[0]) < num_new:
            result = self.run(0, np.array([[row[-1]] for row in tokens]), lengths)
            for row, token in zip(tokens, result["top_ids"][:, 0], strict=True):
                row.append(int(token))
            lengths = [length + 1 for length in lengths]
        return tokens
