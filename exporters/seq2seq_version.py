"""The version folder of an encoder–decoder: two graphs, model.json and tokenizer, without certificate and seal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from exporters.checkpoint import Checkpoint
from exporters.config import ExportConfig
from exporters.decoder import MAX_TOP_LOGITS
from exporters.generation_config import ignored_settings
from exporters.graph import save_graph
from exporters.original import load_seq2seq_model, load_tokenizer
from exporters.passes import apply_passes
from exporters.seq2seq import measure, trace
from exporters.seq2seq_config import ENCODER_GRAPH, seq2seq_version_config
from exporters.version import GRAPH, Written, write_tokenizer


def write_seq2seq(
    export: ExportConfig, checkpoint: Checkpoint, folder: Path, on_step: Callable[[str], None]
) -> Written:
    """Write everything but certificate and seal; ``on_step`` is told the step that begins."""
    on_step("load")
    model, tokenizer = load_seq2seq_model(checkpoint), load_tokenizer(checkpoint)

    on_step("trace")
    shape = measure(model)
    num_top_logits = min(MAX_TOP_LOGITS, shape.vocab_size)
    settings = seq2seq_version_config(export, checkpoint, model, shape, num_top_logits)
    max_source_len, max_model_len = settings.engine.max_source_len, settings.engine.max_model_len
    programs = trace(model, num_top_logits, max_source_len, max_model_len)

    on_step("fuse")
    encoder = apply_passes(programs.encoder.model, export, max_source_len, model)
    decoder = apply_passes(programs.decoder.model, export, max_model_len, model)

    on_step("save")
    save_graph(programs.encoder, folder / ENCODER_GRAPH)
    save_graph(programs.decoder, folder / GRAPH)
    settings.write(folder)
    write_tokenizer(folder, tokenizer, checkpoint, shape.vocab_size)
    sizes = {**decoder.document(), "encoder": encoder.document()}
    return Written(sizes, ignored_settings=ignored_settings(model.generation_config))
