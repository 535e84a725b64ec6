"""model.json of an encoder–decoder: what a decoder's has, and how generation begins and how long a source may be.

How generation begins is read from the loaded model's generation config, which is what ``generate`` of transformers goes
by: generation_config.json, or config.json where a checkpoint has no such file.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel

from exporters.checkpoint import Checkpoint
from exporters.config import MAX_NUM_BATCHED_TOKENS, ExportConfig
from exporters.decoder import DecoderShape
from exporters.errors import InvalidCheckpoint, InvalidConfig
from exporters.rope import constant_frequency_limit
from exporters.seq2seq import Seq2SeqShape
from exporters.version import version_config
from triton_backend.config import LayerConfig, VersionConfig

ENCODER_GRAPH = "encoder.onnx"
DEFAULT_MAX_SOURCE_LEN = 1024
"""Upper bound of max_source_len when none is asked for: every cache row has room for it in every layer."""


@dataclass(frozen=True)
class GenerationStart:
    """What ``generate`` does by itself, apart from choosing tokens.

    decoder_start_token_id  the first token of the decoder, which is not part of the output
    forced_bos_token_id     the token after it, whatever the model says, such as a target language
    forced_eos_token_id     the last token of an output that reaches its length limit
    """

    decoder_start_token_id: int
    forced_bos_token_id: int | None
    forced_eos_token_id: int | None


def generation_start(model: PreTrainedModel) -> GenerationStart:
    """Read off ``model``; raises InvalidCheckpoint if it does not say how a decoder's input begins."""
    found: Any = model.generation_config
    start = found.decoder_start_token_id
    if start is None:
        start = found.bos_token_id
    start = _single(start)
    if start is None:
        raise InvalidCheckpoint(
            "generation_config.json and config.json have no decoder_start_token_id (nor bos_token_id); expected the "
            "token that the decoder's input begins with: add it to generation_config.json"
        )
    return GenerationStart(
        decoder_start_token_id=start,
        forced_bos_token_id=_single(found.forced_bos_token_id),
        forced_eos_token_id=_single(found.forced_eos_token_id),
    )


def max_source_positions(model: PreTrainedModel, shape: Seq2SeqShape) -> int | None:
    """Longest source, in tokens, that the encoder can take; None if it has no limit of its own."""
    config: Any = model.get_encoder().config
    limits = [getattr(config, "max_position_embeddings", None), shape.source_window, constant_frequency_limit(config)]
    return min((limit for limit in limits if limit is not None), default=None)


def seq2seq_version_config(
    export: ExportConfig, checkpoint: Checkpoint, model: PreTrainedModel, shape: Seq2SeqShape, num_top_logits: int
) -> VersionConfig:
    """model.json of the version; raises InvalidConfig if the asked lengths do not suit the model."""
    decoder = DecoderShape(shape.layers, shape.vocab_size)
    base = version_config(export, checkpoint, model, decoder, num_top_logits)
    limit = max_source_positions(model, shape)
    if export.max_source_len is not None and limit is not None and export.max_source_len > limit:
        raise InvalidConfig(
            f"max_source_len has value {export.max_source_len}; the encoder of this model takes {limit} tokens: "
            "pass at most that"
        )
    max_source_len = export.max_source_len or min(limit or DEFAULT_MAX_SOURCE_LEN, DEFAULT_MAX_SOURCE_LEN)
    # The graph takes no more new tokens at once than a source has room for (cross_attention).
    if max_source_len < min(export.max_num_seqs + 2, base.engine.max_model_len):
        raise InvalidConfig(
            f"max_source_len has value {max_source_len}; expected at least max_num_seqs + 2 = "
            f"{export.max_num_seqs + 2}, or at least max_model_len = {base.engine.max_model_len}; raise it or lower one"
        )
    engine = export.engine_config(base.engine.max_model_len, min(MAX_NUM_BATCHED_TOKENS, max_source_len))
    if export.engine.get("max_num_batched_tokens", 0) > max_source_len:
        raise InvalidConfig(
            f"engine setting max_num_batched_tokens has value {engine.max_num_batched_tokens}; this model takes at "
            f"most max_source_len = {max_source_len} at once: raise that or lower it"
        )
    start = generation_start(model)
    return VersionConfig(
        replace(
            base.model,
            kind="encoder_decoder",
            encoder_graph=ENCODER_GRAPH,
            cross_layers=tuple(LayerConfig(layer.num_kv_heads, layer.head_size) for layer in shape.cross_layers),
            decoder_start_token_id=start.decoder_start_token_id,
            forced_bos_token_id=start.forced_bos_token_id,
            forced_eos_token_id=start.forced_eos_token_id,
            source_vocab_size=_source_vocab_size(model, shape),
        ),
        replace(engine, max_source_len=max_source_len),
    )


def _source_vocab_size(model: PreTrainedModel, shape: Seq2SeqShape) -> int | None:
    """Tokens that the encoder knows, if they are not those of the head."""
    embeddings: Any = model.get_encoder().get_input_embeddings()
    return None if embeddings.num_embeddings == shape.vocab_size else int(embeddings.num_embeddings)


def _single(token: Any) -> int | None:
    """Some settings may be a token or a list of tokens."""
    if isinstance(token, list | tuple):
        token = token[0] if token else None
    return None if token is None else int(token)
