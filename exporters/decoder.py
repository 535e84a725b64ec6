"""The decoder graph: a causal model wrapped so that its inputs and outputs are the engine's graph contract.

``DecoderStep`` feeds the cache to the attention nodes, lets the head see only the positions whose logits are wanted,
and adds the largest logits. ``trace`` turns it into ONNX. The model itself is neither rewritten nor copied; hooks and
the attention interface do all of it, so nothing here knows an architecture.

    input_ids, position_ids        int64 (B, S)        logits          float32 (N, V)
    seqlens_k                      int32 (B)           top_logits      float32 (N, K)
    total_sequence_length          int32 ()        →   top_ids         int64   (N, K)
    logits_index                   int64 (N)           present.{i}.*   (B, KV, max_len, D)
    past_key_values.{i}.key/value  (B, KV, max_len, D)

``logits_index`` holds positions b·S + s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from exporters.attention import AttentionShapes, GraphAttention, LayerShape, PlainAttention, registered
from exporters.errors import UnsupportedArchitecture, reason_of
from exporters.generation_config import suppressed_tokens
from exporters.masks import MaskRecorder
from exporters.positions import ToldPositions
from exporters.rope import constant_frequencies
from exporters.tracing import trace_module

if TYPE_CHECKING:
    from torch.onnx import ONNXProgram

MAX_TOP_LOGITS = 64
"""K of ``top_logits``: enough for greedy, sampling and beams in the common case."""
NUM_DRY_TOKENS = 24
"""Length of the prompt on which a model is measured."""
TOLERANCE = 1e-3
"""Of the largest logit: far above rounding, far below what a missing part of a model changes."""


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
    """Forward pre-hook of the head: keeps of the hidden states (B, S, E) only the positions ``index`` (N), as b·S + s.

    Placed before the head, not after it, so that the product with the vocabulary is paid for these only; what the model
    does with the logits afterwards (soft caps, scales) still happens.
    """

    def __init__(self) -> None:
        self.index: torch.Tensor | None = None
        self.num_calls = 0

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        assert self.index is not None
        self.num_calls += 1
        hidden = args[0]
        picked = torch.index_select(hidden.reshape(-1, hidden.shape[-1]), 0, self.index)
        return (picked.unsqueeze(1), *args[1:])  # (N, 1, E)


class DecoderStep(torch.nn.Module):
    """One step of a decoder over a shared past/present buffer: S new tokens for each of B rows."""

    bans: torch.Tensor | None

    def __init__(
        self,
        model: PreTrainedModel,
        attention: GraphAttention,
        head: HeadIndex,
        positions: Any,
        num_top_logits: int,
    ) -> None:
        super().__init__()
        self.model = model
        self.attention = attention
        self.head = head
        self.positions = positions
        self.num_top_logits = num_top_logits
        suppressed, bans = suppressed_tokens(model), None
        if suppressed:
            bans = torch.zeros(model.get_output_embeddings().weight.shape[0])  # (V)
            bans[suppressed] = -torch.inf
        self.register_buffer("bans", bans)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        seqlens_k: torch.Tensor,
        total_sequence_length: torch.Tensor,
        logits_index: torch.Tensor,
        past_key_values: Sequence[tuple[torch.Tensor, torch.Tensor]],
    ) -> tuple[Any, ...]:
        self.attention.begin(past_key_values, seqlens_k, total_sequence_length, position_ids)
        self.head.index = logits_index
        logits = self._logits(input_ids, position_ids)[:, 0].float()
        allowed = logits if self.bans is None else logits + self.bans
        top_logits, top_ids = torch.topk(allowed, self.num_top_logits, dim=-1, largest=True, sorted=True)
        return logits, top_logits, top_ids, self.attention.present

    def _logits(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """(N, 1, V): the head sees N positions."""
        output = self.model(input_ids=input_ids, **self.positions.arguments(position_ids), use_cache=False)
        logits: torch.Tensor = output.logits
        return logits


def measure(model: PreTrainedModel) -> DecoderShape:
    """Sizes of the decoder, from dry runs; raises UnsupportedArchitecture with the reason if it is not one that the
    graph contract can hold, or if attention nodes would not compute what it computes (which a model on the meta device
    cannot show).
    """
    name = type(model).__name__
    try:
        return _measure(model)
    except UnsupportedArchitecture as error:
        if name in str(error):
            raise
        raise UnsupportedArchitecture(f"{name}: {error}") from None
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
        raise UnsupportedArchitecture(
            f"{name} does not run as a plain decoder of text with attention that is not its own "
            f"({reason_of(error)}); use a model of an architecture that does, such as Llama or Qwen2"
        ) from error


def _measure(model: PreTrainedModel) -> DecoderShape:
    name = type(model).__name__
    with registered(model, _never_called):
        pass  # whether it can be is the first thing to know
    generator = torch.Generator().manual_seed(0)
    vocab_size = int(model.config.get_text_config(decoder=True).vocab_size)
    ids = torch.randint(vocab_size // 2, vocab_size, (1, NUM_DRY_TOKENS), generator=generator)
    ids_at = torch.arange(NUM_DRY_TOKENS).unsqueeze(0)
    masks = MaskRecorder(_num_positions(model))
    shapes, head, positions = AttentionShapes(masks), HeadIndex(), ToldPositions(model)
    head.index = torch.full((1,), NUM_DRY_TOKENS - 1)
    with torch.no_grad(), positions.handed_over(), constant_frequencies(model):

        def logits_of(ids: torch.Tensor, ids_at: torch.Tensor) -> torch.Tensor:
            return model(input_ids=ids, **positions.arguments(ids_at), use_cache=False).logits

        with registered(model, shapes, masks):
            with _hooked(model, head):
                last = logits_of(ids, ids_at)
            layers = tuple(shapes.layers)
            if not layers:
                raise UnsupportedArchitecture(
                    f"{name} never calls transformers' attention interface (it is recurrent, convolutional, or its "
                    "attention is written into the model); use an architecture that does, such as Llama or Qwen2"
                )
            if head.num_calls != 1 or last.shape[1] != 1:
                raise UnsupportedArchitecture(
                    f"{name} calls its output embeddings {head.num_calls} times per step; expected once"
                )
            if last.is_meta:  # a model without numbers has sizes only
                return DecoderShape(layers, last.shape[-1])
            together = logits_of(ids, ids_at)[0]
            alone = logits_of(ids.T, ids_at.T)[:, 0]
        _check_same(
            together,
            alone,
            f"{name} lets tokens see each other, or counts them, outside of its attention (recurrent or convolutional "
            "layers, positions of its own), which a cache of keys and values cannot hold",
        )
        with registered(model, PlainAttention(layers)):
            found = logits_of(ids, ids_at)[0]
        expected = logits_of(ids, ids_at)[0]
        _check_same(found, expected, f"{name} does more in its attention than the attention node computes")
    return DecoderShape(layers, last.shape[-1])


def _never_called(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("nothing runs")


def _check_same(found: torch.Tensor, expected: torch.Tensor, reason: str) -> None:
    """Both (S, V). A router may toss a coin between experts that are as good, so that one token in ten may differ."""
    error = (found - expected).abs().amax(-1) / expected.abs().amax(-1).clamp(min=1e-6)
    differing = int((error > TOLERANCE).sum())
    if differing > len(error) // 10:
        raise UnsupportedArchitecture(
            f"{reason}: logits of {differing} of {len(error)} tokens differ, by up to {float(error.max()):.2g} of the "
            "largest; use a model of an architecture without that, such as Llama or Qwen2"
        )


def _num_positions(model: PreTrainedModel) -> int:
    """How long sequences to look at for windows."""
    return min(getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or 4096, 1 << 18)


def trace(model: PreTrainedModel, layers: Sequence[LayerShape], num_top_logits: int) -> ONNXProgram:
    """Trace ``model`` into one ONNX decoder graph with dynamic B, S and max_len. The weights are shared, not copied."""
    attention, head, positions = GraphAttention(layers), HeadIndex(), ToldPositions(model)
    decoder = DecoderStep(model, attention, head, positions, num_top_logits).eval()
    # Sizes that occur nowhere else, so that the tracer cannot mistake one for another.
    num_rows, num_tokens, max_len = 3, 5, 23
    tokens = torch.zeros((num_rows, num_tokens), dtype=torch.int64)
    inputs: dict[str, Any] = {
        "input_ids": tokens,
        "position_ids": torch.arange(num_tokens).expand(num_rows, -1).clone(),
        "seqlens_k": torch.full((num_rows,), num_tokens - 1, dtype=torch.int32),
        "total_sequence_length": torch.tensor(num_tokens, dtype=torch.int32),
        "logits_index": torch.arange(num_rows * num_tokens - 2),
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
        "logits_index": {0: "positions"},
        "past_key_values": [(cache_axes, cache_axes) for _ in layers],
    }
    cache_names = [f"{{}}.{layer}.{part}" for layer in range(len(layers)) for part in ("key", "value")]
    input_names = [name for name in inputs if name != "past_key_values"]
    input_names += [name.format("past_key_values") for name in cache_names]
    output_names = ["logits", "top_logits", "top_ids", *(name.format("present") for name in cache_names)]
    with (
        registered(model, attention),
        _hooked(model, head),
        positions.handed_over(),
    ):
        return trace_module(model, decoder, inputs, axes, input_names, output_names)


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
