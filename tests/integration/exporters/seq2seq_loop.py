"""Greedy decoding over the two graphs of an encoder–decoder, in the slowest, most obvious way.

Every source is encoded alone and its keys and values are put at the front of its row; what is behind them is noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from transformers import GenerationConfig, GenerationMixin

from exporters.fusions import fuse
from exporters.graph import save_graph
from exporters.reference_loop import MAX_POSITIONS, GraphLoop
from exporters.seq2seq import trace

MAX_SOURCE_LEN = 40


def export_graphs(model: Any, folder: Path, *, fused: bool = True) -> Path:
    """``encoder.onnx`` and ``model.onnx`` of ``model`` in ``folder``, as an export writes them."""
    program = trace(model, 64, MAX_SOURCE_LEN, MAX_POSITIONS)
    folder.mkdir(exist_ok=True)
    for name, part, length in (
        ("encoder.onnx", program.encoder, MAX_SOURCE_LEN),
        ("model.onnx", program.decoder, MAX_POSITIONS),
    ):
        if fused:
            fuse(part.model, length)
        save_graph(part, folder / name)
    return folder


def generate(
    model: Any,
    source: Sequence[int],
    prefix: Sequence[int],
    num_new: int,
    banned: Sequence[int] = (),
    forced_bos_token_id: int | None = None,
) -> list[int]:
    """Greedy tokens of the original after ``prefix``, which begins with the decoder's start token.

    No token may be used twice, nor one that is ``banned``: a model with random weights would repeat itself for ever.
    """
    model.generation_config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=num_new,
        pad_token_id=0,
        decoder_start_token_id=prefix[0],
        no_repeat_ngram_size=1,
        suppress_tokens=list(banned),
        forced_bos_token_id=forced_bos_token_id,
    )
    ids = torch.tensor([source])
    with torch.no_grad():
        output = GenerationMixin.generate(
            model, ids, attention_mask=torch.ones_like(ids), decoder_input_ids=torch.tensor([prefix])
        )
    return output[0, len(prefix) :].tolist()


class Encoder:
    """Runs ``encoder.onnx``."""

    def __init__(self, path: Path) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.names = [output.name for output in self.session.get_outputs()]

    def __call__(self, sources: Sequence[Sequence[int]], pad_token_id: int = 0) -> dict[str, np.ndarray]:
        """cross.{i}.key/value (B, KV, S, D) of the ``sources``, padded on the right."""
        longest = max(map(len, sources))
        ids = np.full((len(sources), longest), pad_token_id, np.int64)
        mask = np.zeros_like(ids)
        for row, source in enumerate(sources):
            ids[row, : len(source)] = source
            mask[row, : len(source)] = 1
        outputs = self.session.run(self.names, {"input_ids": ids, "attention_mask": mask})
        return dict(zip(self.names, outputs, strict=True))


class Seq2SeqLoop(GraphLoop):
    """Runs both graphs in ``folder`` over ``num_rows`` cache rows of ``max_len`` tokens."""

    def __init__(self, folder: Path, num_rows: int, max_len: int) -> None:
        super().__init__(folder / "model.onnx", num_rows, max_len)
        self.encode = Encoder(folder / "encoder.onnx")
        noise = np.random.default_rng(5)
        self.cross = {
            i.name: 100 * noise.standard_normal((num_rows, i.shape[1], MAX_SOURCE_LEN, i.shape[3]), np.float32)
            for i in self.session.get_inputs()
            if i.name.startswith("cross.")
        }
        self.source_lens = np.ones(num_rows, np.int32)

    def place(self, row: int, source: Sequence[int]) -> None:
        """Have ``row`` decode from ``source``."""
        for name, states in self.encode([source]).items():
            self.cross[name][row, :, : len(source)] = states[0]
        self.source_lens[row] = len(source)

    def row_inputs(self, rows: slice) -> dict[str, np.ndarray]:
        return {"source_lens": self.source_lens[rows], **{name: states[rows] for name, states in self.cross.items()}}

    def decode(
        self,
        prefixes: Sequence[Sequence[int]],
        chunks: Sequence[Sequence[int]],
        num_new: int,
        banned: Sequence[int] = (),
    ) -> tuple[list[list[int]], np.ndarray]:
        """What ``generate`` gives for the rows' sources, decoded together in rows 0…n−1; prefixes in chunks.

        Returns the new tokens and the logits (num_new, n, V) that they were chosen from.
        """
        texts = [list(prefix) for prefix in prefixes]
        logits = []
        for row, prefix in enumerate(prefixes):
            assert sum(chunks[row]) == len(prefix)
            done = 0
            for size in chunks[row]:
                result = self.run(row, np.array([prefix[done : done + size]]), [done])
                done += size
            logits.append(result["logits"])
        steps = [np.concatenate(logits)]
        while True:
            for text, scores in zip(texts, steps[-1], strict=True):
                allowed = scores.copy()
                allowed[[*text, *banned]] = -np.inf
                text.append(int(allowed.argmax()))
            if len(steps) == num_new:
                break
            result = self.run(0, np.array([[text[-1]] for text in texts]), [len(text) - 1 for text in texts])
            steps.append(result["logits"])
        return [text[len(prefix) :] for text, prefix in zip(texts, prefixes, strict=True)], np.stack(steps)
