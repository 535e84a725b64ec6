"""The decoder graph: a causal model wrapped so that its inputs and outputs are the engine's graph contract.

``DecoderStep`` feeds the cache to the attention nodes, lets the head see one position per row only, and adds the
largest logits. ``trace`` turns it into ONNX. The model itself is neither rewritten nor copied; hooks and the attention
interface do all of it, so nothing here knows an architecture.

    input_ids, position_ids        int64 (B, S)        logits          float32 (B, V)
    seqlens_k                      int32 (B)           top_logits      float32 (B, K)
    total_sequence_length          int32 ()        →   top_ids         int64   (B, K)
    logits_index                   int64 (B)           present.{i}.*   (B, KV, max_len, D)
    past_key_values.{i}.key/value  (B, KV, max_len, D)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from exporters.attention import AttentionShapes, GraphAttention, LayerShape, registered
from exporters.errors import UnsupportedArchitecture
from exporters.norms import fused_norms
from exporters.rope import constant_frequencies

if TYPE_CHECKING:
    from torch.onnx import ONNXProgram

MAX_TOP_LOGITS = 64
"""K of ``top_logits``: enough for greedy, sampling and beams in the common case."""


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a decoder: one entry per layer, and V, the width of its head."""

    layers: tuple[LayerShape, ...]
    vocab_size: int

    @property
    def sliding_window(self) -> int | None:
        """The widest window of any layer, in tokens; None if all layers see everything."""
        return max((layer.sliding_window for layer in self.layers if layer.sliding_window), default=None)


class HeadIndex:
    """Forward pre-hook of the head: keeps of the hidden states (B, S, E) only position ``index`` of each row.

    Placed before the head, not after it, so that the product with the vocabulary is paid once per row; what the model
    does with the logits afterwards (soft caps, scales) still happens.
    """

    def __init__(self) -> None:
        self.index: torch.Tensor | None = None
        self.num_calls = 0

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        assert self.index is not None
        self.num_calls += 1
        hidden = args[0]
        index = self.index.reshape(-1, 1, 1).expand(-1, 1, hidden.shape[-1])
        return (torch.gather(hidden, 1, index), *args[1:])  # (B, 1, E)


class DecoderStep(torch.nn.Module):
    """One step of a decoder over a shared past/present buffer: S new tokens for each of B rows."""

    def __init__(
        self, model: PreTrainedModel, attention: GraphAttention, head: HeadIndex, num_layers: int, num_top_logits: int
    ) -> None:
        super().__init__()
        self.model = model
        self.attention = attention
        self.head = head
        self.num_layers = num_layers
        self.num_top_logits = num_top_logits

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        seqlens_k: torch.Tensor,
        total_sequence_length: torch.Tensor,
        logits_index: torch.Tensor,
        past_key_values: Sequence[tuple[torch.Tensor, torch.Tensor]],
    ) -> tuple[Any, ...]:
        self.attention.past = list(past_key_values)
        self.attention.present = {}
        self.attention.seqlens_k = seqlens_k
        self.attention.total_sequence_length = total_sequence_length
        self.head.index = logits_index
        logits = self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits[:, 0].float()
        top_logits, top_ids = torch.topk(logits, self.num_top_logits, dim=-1, largest=True, sorted=True)
        present = [self.attention.present[layer] for layer in range(self.num_layers)]
        return logits, top_logits, top_ids, present


def measure(model: PreTrainedModel) -> DecoderShape:
    """Sizes of the decoder, from one dry run; raises UnsupportedArchitecture with the reason
    if it is not one that the graph contract can hold.
    """
    shapes, head = AttentionShapes(), HeadIndex()
    input_ids = torch.zeros((1, 2), dtype=torch.int64)
    head.index = torch.zeros(1, dtype=torch.int64)
    with registered(model, shapes), _hooked(model, head), constant_frequencies(model), torch.no_grad():
        logits = model(input_ids=input_ids, position_ids=torch.arange(2).unsqueeze(0), use_cache=False).logits
    expected = model.config.get_text_config().num_hidden_layers
    if sorted(shapes.layers) != list(range(expected)):
        raise UnsupportedArchitecture(
            f"{type(model).__name__} has {expected} layers, of which {len(shapes.layers)} use transformers' attention "
            "interface; expected all of them (models with recurrent or convolutional layers are not exported)"
        )
    _check_layer_types(model, shapes)
    if head.num_calls != 1 or logits.shape[1] != 1:
        raise UnsupportedArchitecture(
            f"{type(model).__name__} calls its output embeddings {head.num_calls} times per step; expected once"
        )
    return DecoderShape(tuple(shapes.layers[layer] for layer in range(expected)), logits.shape[-1])


def trace(model: PreTrainedModel, layers: Sequence[LayerShape], num_top_logits: int) -> ONNXProgram:
    """Trace ``model`` into one ONNX decoder graph with dynamic B, S and max_len. The weights are shared, not copied."""
    attention, head = GraphAttention(), HeadIndex()
    decoder = DecoderStep(model, attention, head, len(layers), num_top_logits).eval()
    # Sizes that occur nowhere else, so that the tracer cannot mistake one for another.
    num_rows, num_tokens, max_len = 3, 5, 23
    tokens = torch.zeros((num_rows, num_tokens), dtype=torch.int64)
    inputs: dict[str, Any] = {
        "input_ids": tokens,
        "position_ids": torch.arange(num_tokens).expand(num_rows, -1).clone(),
        "seqlens_k": torch.full((num_rows,), num_tokens - 1, dtype=torch.int32),
        "total_sequence_length": torch.tensor(num_tokens, dtype=torch.int32),
        "logits_index": torch.full((num_rows,), num_tokens - 1, dtype=torch.int64),
        "past_key_values": [
            tuple(torch.zeros(num_rows, layer.num_kv_heads, max_len, layer.head_size) for _ in ("key", "value"))
            for layer in layers
        ],
    }
    cache_axes = {0: "batch", 2: "max_len"}
    axes: dict[str, Any] = {
        "input_ids": {0: "batch", 1: "sequence"},
        "position_ids": {0: "batch", 1: "sequence"},
        "seqlens_k": {0: "batch"},
        "total_sequence_length": {},
        "logits_index": {0: "batch"},
        "past_key_values": [(cache_axes, cache_axes) for _ in layers],
    }
    cache_names = [f"{{}}.{layer}.{part}" for layer in range(len(layers)) for part in ("key", "value")]
    input_names = [name for name in inputs if name != "past_key_values"]
    input_names += [name.format("past_key_values") for name in cache_names]
    output_names = ["logits", "top_logits", "top_ids", *(name.format("present") for name in cache_names)]
    with (
        registered(model, attention),
        _hooked(model, head),
        constant_frequencies(model),
        fused_norms(model),
        torch.no_grad(),
    ):
        try:
            program = torch.onnx.export(
                decoder,
                kwargs=inputs,
                dynamic_shapes=axes,
                input_names=input_names,
                output_names=output_names,
                dynamo=True,
                optimize=True,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            cause = str(error.__cause__ or error).strip().splitlines()[0]
            raise UnsupportedArchitecture(
                f"{type(model).__name__} has an operation that cannot be traced to ONNX ({cause}); "
                "use a model of an architecture that can, such as Llama or Qwen2"
            ) from error
    assert program is not None
    return program


def _check_layer_types(model: PreTrainedModel, shapes: AttentionShapes) -> None:
    """Refuse windows that a model expresses only through its mask, which the exported graph does not have."""
    layer_types = getattr(model.config.get_text_config(), "layer_types", None) or []
    for layer, layer_type in enumerate(layer_types):
        window = shapes.layers[layer].sliding_window
        if layer_type == "full_attention" or (layer_type == "sliding_attention" and window is not None):
            continue
        raise UnsupportedArchitecture(
            f"layer {layer} of {type(model).__name__} is of type {layer_type!r} with window {window}; expected full "
            "attention, or sliding attention whose window is passed to the attention function"
        )


class _hooked:
    """Context: ``head`` is the pre-hook of the model's output embeddings."""

    def __init__(self, model: PreTrainedModel, head: HeadIndex) -> None:
        output_embeddings = model.get_output_embeddings()
        if output_embeddings is None:
            raise UnsupportedArchitecture(f"{type(model).__name__} has no output embeddings; expected a language model")
        self._handle = output_embeddings.register_forward_pre_hook(head)

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exc_info: object) -> None:
        self._handle.remove()
