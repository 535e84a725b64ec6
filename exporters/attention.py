"""Attention as one graph node: what the model calls instead of its own attention while it is traced.

Transformers looks its attention function up by name, so a model can be exported untouched: ``GraphAttention`` is
registered under our name, emits one ``com.microsoft.GroupQueryAttention`` node per layer and keeps the tensors of the
cache. ``AttentionShapes`` is registered the same way for a dry run that only writes down each layer's sizes. The mask
function under our name returns None: causality, row lengths and windows are the node's business.

Operator: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.GroupQueryAttention
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from exporters.errors import UnsupportedArchitecture

NAME = "llmos_export"
"""Our name in transformers' attention and mask interfaces."""


class AttentionFunction(Protocol):
    """query (B, H, S, D), key and value (B, KV, S, D), after rotary → output (B, S, H, D) and None for the weights."""

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]: ...


@contextmanager
def registered(model: PreTrainedModel, function: AttentionFunction) -> Iterator[None]:
    """Have ``model`` call ``function`` for attention; raises UnsupportedArchitecture if the model cannot."""
    AttentionInterface.register(NAME, function)
    AttentionMaskInterface.register(NAME, _no_mask)
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(NAME)
        if model.config._attn_implementation != NAME:
            raise UnsupportedArchitecture(
                f"{type(model).__name__} does not use transformers' attention interface (its attention is written into "
                "the model), so it cannot be exported; use a model of an architecture that does, such as Llama or Qwen2"
            )
        yield
    finally:
        model.set_attn_implementation(before)
        AttentionInterface._global_mapping.pop(NAME, None)
        AttentionMaskInterface._global_mapping.pop(NAME, None)


def _no_mask(*args: Any, **kwargs: Any) -> None:
    return None


@dataclass(frozen=True)
class LayerShape:
    """Sizes of one attention call: H query heads, KV key-value heads, head size D and the window (None: all)."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    sliding_window: int | None


class AttentionShapes:
    """Attention of a dry run: records every layer's shape and passes the query on. Owned by the tracing thread."""

    def __init__(self) -> None:
        self.layers: dict[int, LayerShape] = {}

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        layer = _layer_of(module)
        _, num_heads, _, head_size = query.shape
        name = f"layer {layer} ({type(module).__name__})"
        if layer in self.layers:
            raise UnsupportedArchitecture(f"{name} attends more than once per step; expected one attention per layer")
        if value.shape[-1] != head_size or key.shape[-1] != head_size:
            raise UnsupportedArchitecture(
                f"{name} has query, key and value heads of {head_size}, {key.shape[-1]} and {value.shape[-1]}; "
                "GroupQueryAttention expects one head size"
            )
        if head_size % 8:
            raise UnsupportedArchitecture(
                f"{name} has head size {head_size}; GroupQueryAttention expects a multiple of 8"
            )
        if getattr(module, "is_causal", True) is False or kwargs.get("is_causal") is False:
            raise UnsupportedArchitecture(f"{name} attends in both directions; expected causal attention")
        if kwargs.get("position_bias") is not None:
            raise UnsupportedArchitecture(f"{name} adds a position bias to its scores, which is not exported yet")
        self.layers[layer] = LayerShape(num_heads, key.shape[1], head_size, _window_of(kwargs))
        return query.transpose(1, 2), None


class GraphAttention:
    """Attention of the traced model: one GroupQueryAttention node per layer.

    Owned by the decoder wrapper, which fills ``past``, ``seqlens_k`` and ``total_sequence_length`` before the model
    runs and takes ``present`` afterwards: per layer a key and a value of (B, KV, max_len, D).
    """

    def __init__(self) -> None:
        self.past: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.present: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.seqlens_k: torch.Tensor | None = None
        self.total_sequence_length: torch.Tensor | None = None

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        layer = _layer_of(module)
        past_key, past_value = self.past[layer]
        num_rows, num_heads, num_tokens, head_size = query.shape
        num_kv_heads = key.shape[1]

        inputs: list[torch.Tensor | None] = [
            query.transpose(1, 2).reshape(num_rows, num_tokens, num_heads * head_size),
            key.transpose(1, 2).reshape(num_rows, num_tokens, num_kv_heads * head_size),
            value.transpose(1, 2).reshape(num_rows, num_tokens, num_kv_heads * head_size),
            past_key,
            past_value,
            self.seqlens_k,
            self.total_sequence_length,
        ]
        if s_aux is not None:
            inputs += [None, None, None, None, s_aux]  # cos_cache, sin_cache, position_ids, attention_bias, head_sink
        attributes: dict[str, Any] = {"num_heads": num_heads, "kv_num_heads": num_kv_heads}
        if scaling is not None:
            attributes["scale"] = float(scaling)
        if softcap is not None:
            attributes["softcap"] = float(softcap)
        if (window := _window_of(kwargs)) is not None:
            attributes["local_window_size"] = window

        output, present_key, present_value = torch.onnx.ops.symbolic_multi_out(
            "com.microsoft::GroupQueryAttention",
            inputs,
            attributes,
            dtypes=(query.dtype, past_key.dtype, past_value.dtype),
            shapes=((num_rows, num_tokens, num_heads * head_size), past_key.shape, past_value.shape),
            version=1,
        )
        self.present[layer] = (present_key, present_value)
        return output.reshape(num_rows, num_tokens, num_heads, head_size), None


def _layer_of(module: torch.nn.Module) -> int:
    layer = getattr(module, "layer_idx", None)
    if not isinstance(layer, int):
        raise UnsupportedArchitecture(
            f"{type(module).__name__} has layer_idx {layer!r}; expected the number of its decoder layer"
        )
    return layer


def _window_of(kwargs: dict[str, Any]) -> int | None:
    window = kwargs.get("sliding_window")
    return int(window) if window else None
