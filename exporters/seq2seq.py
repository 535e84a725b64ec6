"""The two graphs of an encoder–decoder: what is computed once per source, and the step that is computed per token.

The encoder graph ends with the keys and values of every decoder layer's cross attention, so that the decoder graph
holds none of these projections. Both are traced from the untouched model: the encoder's wrapper runs the decoder on one
token and keeps what its cross attentions are called with; the decoder's wrapper hands it an empty source, which the
attention function does not look at.

    encoder.onnx
    input_ids, attention_mask      int64 (B, S)    →   cross.{i}.key/value  float32 (B, KV, S, D)

    model.onnx
    a decoder's inputs (decoder.py)                    a decoder's outputs
    cross.{i}.key/value  (B, KV, max_source_len, D) →
    source_lens          int32 (B)

Sources are padded on the right. Keys from ``source_lens`` on are not read.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoEModelOutput

from exporters.attention import LayerShape, registered
from exporters.cross_attention import SOURCE_LEN, TARGET_LEN, CrossAttention, EncoderAttention, Seq2SeqShapes
from exporters.decoder import DecoderStep, HeadIndex, _hooked
from exporters.errors import InvalidConfig, UnsupportedArchitecture
from exporters.positions import Positions, biases_positions, embeds_positions, explicit_positions
from exporters.rope import constant_frequencies
from exporters.tracing import trace_module

if TYPE_CHECKING:
    from torch.onnx import ONNXProgram


@dataclass(frozen=True)
class Seq2SeqShape:
    """Sizes of an encoder–decoder.

    ``layers`` and ``cross_layers`` have one entry per decoder layer; ``vocab_size`` is V, the width of the head,
    ``encoder_size`` E of the encoder's output. ``source_window`` is how many tokens an encoder layer looks back and
    ahead at least; None: all.
    """

    layers: tuple[LayerShape, ...]
    cross_layers: tuple[LayerShape, ...]
    vocab_size: int
    encoder_size: int
    source_window: int | None


@dataclass(frozen=True)
class Seq2SeqProgram:
    """Both graphs; weights that both need are in each."""

    encoder: ONNXProgram
    decoder: ONNXProgram


class EncoderStep(torch.nn.Module):
    """Sources (B, S) → keys and values of every decoder layer's cross attention."""

    def __init__(self, model: PreTrainedModel, attention: EncoderAttention, positions: Positions) -> None:
        super().__init__()
        self.model = model
        self.attention = attention
        self.positions = positions

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> list[Any]:
        num_rows, num_tokens = input_ids.shape
        self.attention.source_lens = attention_mask.sum(dim=1).to(torch.int32)
        self.attention.num_tokens = torch.full((), num_tokens, dtype=torch.int32)
        self.attention.cross = {}
        self.positions.key = torch.arange(num_tokens)
        self.positions.query = self.positions.key.unsqueeze(0)
        hidden = self.model.get_encoder()(input_ids=input_ids).last_hidden_state
        _decode(self.model, hidden, input_ids.new_zeros(num_rows, 1))
        return [self.attention.cross[layer] for layer in range(len(self.attention.cross))]


class Seq2SeqStep(DecoderStep):
    """One step of the decoder, beside the keys and values of each row's source."""

    attention: CrossAttention

    positions: Positions

    def __init__(self, *args: Any, encoder_size: int) -> None:
        super().__init__(*args)
        self.encoder_size = encoder_size

    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        seqlens_k: torch.Tensor,
        total_sequence_length: torch.Tensor,
        logits_index: torch.Tensor,
        past_key_values: Sequence[tuple[torch.Tensor, torch.Tensor]],
        cross: Sequence[tuple[torch.Tensor, torch.Tensor]],
        source_lens: torch.Tensor,
    ) -> tuple[Any, ...]:
        self.attention.look_at(cross, source_lens, input_ids.shape[1])
        self.positions.query = position_ids
        self.positions.key = torch.arange(total_sequence_length.item())
        return super().forward(input_ids, position_ids, seqlens_k, total_sequence_length, logits_index, past_key_values)

    def _logits(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        hidden = torch.zeros(input_ids.shape[0], 1, self.encoder_size)
        return _decode(self.model, hidden, input_ids, position_ids)


def _decode(
    model: PreTrainedModel, hidden: torch.Tensor, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None
) -> torch.Tensor:
    """Logits of the decoder's ``input_ids`` (B, S) with the encoder's output ``hidden`` (B, source, E)."""
    outputs = model(
        encoder_outputs=MoEModelOutput(last_hidden_state=hidden),  # some read more off it than the hidden states
        decoder_input_ids=input_ids,
        use_cache=False,
        **({"decoder_position_ids": position_ids} if _takes_positions(model) else {}),
    )
    logits: torch.Tensor = outputs.logits
    return logits


def _takes_positions(model: PreTrainedModel) -> bool:
    """Whether the decoder's positions can be passed to ``model``, by name or as one of the decoder's own arguments."""
    parameters = inspect.signature(model.forward).parameters
    passes_on = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    return "decoder_position_ids" in parameters or (
        passes_on and "position_ids" in inspect.signature(model.get_decoder().forward).parameters
    )


def measure(model: PreTrainedModel) -> Seq2SeqShape:
    """Sizes of the model, from one dry run; raises UnsupportedArchitecture with the reason if the graph contract
    cannot hold it.
    """
    return _dry_run(model)[1]


def _dry_run(model: PreTrainedModel) -> tuple[Seq2SeqShapes, Seq2SeqShape]:
    name = type(model).__name__
    shapes, head = Seq2SeqShapes(model), HeadIndex()
    head.index = torch.zeros(1, dtype=torch.int64)
    with registered(model, shapes), _hooked(model, head), constant_frequencies(model), torch.no_grad():
        source = torch.zeros((1, SOURCE_LEN), dtype=torch.int64)
        hidden = model.get_encoder()(input_ids=source).last_hidden_state
        target = torch.zeros((1, TARGET_LEN), dtype=torch.int64)
        logits = _decode(model, hidden, target, torch.arange(TARGET_LEN).unsqueeze(0))
    for stack, kind, seen in (
        (model.get_encoder(), "encoder", shapes.encoder),
        (model.get_decoder(), "decoder", shapes.self_attention),
        (model.get_decoder(), "cross attention", shapes.cross),
    ):
        expected = num_layers(stack)
        if len(seen) != expected:
            raise UnsupportedArchitecture(
                f"{name} has {expected} {kind} layers, of which {len(seen)} use transformers' attention interface; "
                "expected all of them (sparse and block-wise attention is not exported)"
            )
    if [module.layer_idx for module in shapes.self_attention] != list(range(len(shapes.self_attention))):
        raise UnsupportedArchitecture(f"{name} does not number its decoder layers from 0 on")
    decoder = model.get_decoder()
    if not (_takes_positions(model) or embeds_positions(decoder) or biases_positions(decoder)):
        raise UnsupportedArchitecture(
            f"{name} works out the decoder's positions in a way that is not known here; expected position_ids, "
            "embeddings that are told past_key_values_length, or a relative position bias"
        )
    if head.num_calls != 1 or logits.shape[1] != 1:
        raise UnsupportedArchitecture(
            f"{name} calls its output embeddings {head.num_calls} times per step; expected once"
        )
    windows = [layer.sliding_window for layer in shapes.encoder.values() if layer.sliding_window]
    return shapes, Seq2SeqShape(
        layers=tuple(shapes.self_attention.values()),
        cross_layers=tuple(shapes.cross.values()),
        vocab_size=logits.shape[-1],
        encoder_size=hidden.shape[-1],
        source_window=min(windows, default=None),
    )


def num_layers(stack: torch.nn.Module) -> int:
    """Layers of an encoder or decoder: the length of its outermost list of modules."""
    level = [stack]
    while level:
        level = [child for module in level for child in module.children()]
        if lists := [len(child) for child in level if isinstance(child, torch.nn.ModuleList)]:
            return max(lists)
    return 0


def trace(model: PreTrainedModel, num_top_logits: int, max_source_len: int, max_model_len: int) -> Seq2SeqProgram:
    """Trace ``model`` into an encoder and a decoder graph with dynamic B, S, max_len and max_source_len.

    Sources have at most ``max_source_len`` tokens, outputs ``max_model_len``: positions are kept as tables of that
    size. The weights are shared with the model, not copied. Raises InvalidConfig if the encoder cannot see all of such
    a source at once.
    """
    shapes, shape = _dry_run(model)
    if shape.source_window is not None and max_source_len > shape.source_window:
        raise InvalidConfig(
            f"max_source_len has value {max_source_len}; layers of the encoder of {type(model).__name__} see "
            f"{shape.source_window} tokens around each token, and longer sources are not exported: pass at most that"
        )
    encoder = _trace_encoder(model, shapes, max_source_len)
    decoder = _trace_decoder(model, shapes, shape, num_top_logits, max_model_len)
    return Seq2SeqProgram(encoder, decoder)


def _trace_encoder(model: PreTrainedModel, shapes: Seq2SeqShapes, max_source_len: int) -> ONNXProgram:
    attention = EncoderAttention(list(shapes.encoder), list(shapes.cross))
    tokens = torch.zeros((3, 5), dtype=torch.int64)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    axes = {name: {0: "batch", 1: "sequence"} for name in inputs}
    with registered(model, attention), explicit_positions(model.get_encoder(), max_source_len) as positions:
        wrapper = EncoderStep(model, attention, positions).eval()
        return trace_module(model, wrapper, inputs, axes, list(inputs), _part_names("cross", len(shapes.cross)))


def _trace_decoder(
    model: PreTrainedModel, shapes: Seq2SeqShapes, shape: Seq2SeqShape, num_top_logits: int, max_model_len: int
) -> ONNXProgram:
    attention, head = CrossAttention(shape.layers, list(shapes.cross)), HeadIndex()
    # Sizes that occur nowhere else, so that the tracer cannot mistake one for another.
    num_rows, num_tokens, max_len, max_source_len = 3, 5, 23, 29
    tokens = torch.zeros((num_rows, num_tokens), dtype=torch.int64)

    def cache(layers: Sequence[LayerShape], length: int) -> list[tuple[torch.Tensor, ...]]:
        return [
            tuple(torch.zeros(num_rows, layer.num_kv_heads, length, layer.head_size) for _ in ("key", "value"))
            for layer in layers
        ]

    inputs: dict[str, Any] = {
        "input_ids": tokens,
        "position_ids": torch.arange(num_tokens).expand(num_rows, -1).clone(),
        "seqlens_k": torch.full((num_rows,), num_tokens - 1, dtype=torch.int32),
        "total_sequence_length": torch.tensor(num_tokens, dtype=torch.int32),
        "logits_index": torch.arange(num_rows * num_tokens - 2),
        "past_key_values": cache(shape.layers, max_len),
        "cross": cache(shape.cross_layers, max_source_len),
        "source_lens": torch.full((num_rows,), max_source_len, dtype=torch.int32),
    }
    row, token = {0: "batch"}, {0: "batch", 1: "sequence"}
    past, source = {0: "batch", 2: "max_len"}, {0: "batch", 2: "max_source_len"}
    axes: dict[str, Any] = {
        "input_ids": token,
        "position_ids": token,
        "seqlens_k": row,
        "total_sequence_length": {},
        "logits_index": {0: "positions"},
        "past_key_values": [(past, past) for _ in shape.layers],
        "cross": [(source, source) for _ in shape.cross_layers],
        "source_lens": row,
    }
    num_layers = len(shape.layers)
    input_names: list[str] = []
    for name in inputs:
        input_names += _part_names(name, num_layers) if name in ("past_key_values", "cross") else [name]
    output_names = ["logits", "top_logits", "top_ids", *_part_names("present", num_layers)]
    with (
        registered(model, attention),
        _hooked(model, head),
        explicit_positions(model.get_decoder(), max_model_len) as positions,
    ):
        wrapper = Seq2SeqStep(model, attention, head, positions, num_top_logits, encoder_size=shape.encoder_size).eval()
        return trace_module(model, wrapper, inputs, axes, input_names, output_names)


def _part_names(tensor: str, num_layers: int) -> list[str]:
    return [f"{tensor}.{layer}.{part}" for layer in range(num_layers) for part in ("key", "value")]
