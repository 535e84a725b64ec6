"""The version folder of a decoder: graph, model.json and tokenizer, without certificate and seal."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from exporters.checkpoint import Checkpoint
from exporters.config import ExportConfig
from exporters.decoder import MAX_TOP_LOGITS, measure, trace
from exporters.generation_config import ignored_settings
from exporters.graph import save_graph
from exporters.original import load_model, load_tokenizer
from exporters.passes import apply_passes
from exporters.quantization import read_calibration
from exporters.version import GRAPH, Written, version_config, write_tokenizer


def write_decoder(
    export: ExportConfig, checkpoint: Checkpoint, folder: Path, on_step: Callable[[str], None]
) -> Written:
    """Write everything but certificate and seal; ``on_step`` is told the step that begins."""
    on_step("load")
    model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)

    on_step("trace")
    shape = measure(model)
    num_top_logits = min(MAX_TOP_LOGITS, shape.vocab_size)
    settings = version_config(export, checkpoint, model, shape, num_top_logits)
    program = trace(model, shape.layers, num_top_logits)

    on_step("fuse")
    max_model_len = settings.engine.max_model_len
    texts = None
    if export.calibration is not None:
        texts = read_calibration(export.calibration, lambda text: tokenizer(text)["input_ids"], max_model_len)
    report = apply_passes(program.model, export, max_model_len, model, texts)

    on_step("save")
    save_graph(program, folder / GRAPH)
    dataclasses.replace(settings, model=dataclasses.replace(settings.model, lora=report.lora)).write(folder)
    write_tokenizer(folder, tokenizer, checkpoint, shape.vocab_size)
    return Written(report.document(), shape.sliding_window, ignored_settings(model.generation_config))
