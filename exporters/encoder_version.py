"""The version folder of an encoder: graph, model.json and tokenizer, without certificate and seal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedModel

from exporters.checkpoint import Checkpoint
from exporters.config import ExportConfig
from exporters.encoder import EncoderShape, load_encoder, measure, pad_token_id_of, trace
from exporters.errors import InvalidConfig
from exporters.graph import save_graph
from exporters.original import load_tokenizer
from exporters.passes import apply_passes
from exporters.pooling import Pooling, read_pooling
from exporters.version import GRAPH, Written, write_tokenizer
from triton_backend.config import ModelConfig, VersionConfig

DEFAULT_MAX_TOKENS = 8192
"""Upper bound of an encoder's max_model_len when neither the export nor the checkpoint's authors give one."""
MAX_NUM_BATCHED_TOKENS = 16384
"""Tokens of one batch, padding included: hidden states of a batch this large still fit beside the weights."""


def write_encoder(
    export: ExportConfig, checkpoint: Checkpoint, folder: Path, on_step: Callable[[str], None]
) -> Written:
    """Write everything but certificate and seal; ``on_step`` is told the step that begins."""
    on_step("load")
    pooling = read_pooling(checkpoint.folder)
    model, tokenizer = load_encoder(checkpoint), load_tokenizer(checkpoint)

    on_step("trace")
    shape = measure(model, pooling)
    settings = version_config(export, checkpoint, model, shape, pooling)
    program = trace(model, pooling)

    on_step("fuse")
    report = apply_passes(program.model, export, settings.engine.max_model_len, model)

    on_step("save")
    save_graph(program, folder / GRAPH)
    settings.write(folder)
    write_tokenizer(folder, tokenizer, checkpoint, shape.vocab_size)
    return Written(report.document())


def version_config(
    export: ExportConfig, checkpoint: Checkpoint, model: PreTrainedModel, shape: EncoderShape, pooling: Pooling
) -> VersionConfig:
    """model.json of an encoder; raises InvalidConfig if the asked length does not suit the model."""
    if export.max_model_len is not None and export.max_model_len > shape.max_tokens:
        raise InvalidConfig(
            f"max_model_len has value {export.max_model_len}; this model has positions for {shape.max_tokens} tokens: "
            "pass at most that"
        )
    max_model_len = export.max_model_len or min(shape.max_tokens, pooling.max_tokens or DEFAULT_MAX_TOKENS)
    return VersionConfig(
        ModelConfig(
            architecture=type(model).__name__,
            model_type=checkpoint.model_type,
            vocab_size=shape.vocab_size,
            max_position_embeddings=shape.max_tokens,
            layers=shape.layers,
            num_top_logits=0,
            pad_token_id=pad_token_id_of(model),
            precision=export.precision,
            kind="encoder",
            pooling=pooling.mode,
            normalize=pooling.normalize,
            embedding_size=shape.embedding_size,
        ),
        export.engine_config(max_model_len, max_num_batched_tokens=max(MAX_NUM_BATCHED_TOKENS, max_model_len)),
    )
