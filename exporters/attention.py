"""Attention as one graph node: what the model calls instead of its own attention while it is traced.

Transformers looks its attention function up by name, so a model can be exported untouched: ``GraphAttention`` is
registered under our name, emits one ``com.microsoft.GroupQueryAttention`` node per layer and keeps the tensors of the
cache. ``AttentionShapes`` is registered the same way for a dry run that only writes down each layer's sizes, and
``PlainAttention`` for one that shows that the nodes will compute what the model's own attention does. The mask function
under our name returns None: causality, row lengths and windows are the node's business.

Operator: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.GroupQueryAttention
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from exporters.errors import UnsupportedArchitecture
from exporters.masks import MaskRecorder

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
def registered(
    model: PreTrainedModel, function: AttentionFunction, mask: Callable[..., torch.Tensor | None] | None = None
) -> Iterator[None]:
    """Have ``model`` call ``function`` for attention; raises UnsupportedArchitecture if the model cannot.

    ``mask`` makes the attention masks that it gets; without it there are none.
    """
    AttentionInterface.register(NAME, function)
    AttentionMaskInterface.register(NAME, mask or _no_mask)
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
    """Sizes of one attention call: H query heads, KV key-value heads, head size D and which keys are seen.

    D is what the cache holds: a multiple of 8 that has room for keys and values, which may be narrower. Layers are
    numbered in the order in which they attend.
    """

    num_heads: int
    num_kv_heads: int
    head_size: int
    sliding_window: int | None
    chunk: int | None = None


ALLOWED = {
    "dropout",
    "scaling",
    "softcap",
    "s_aux",
    "sliding_window",
    "is_causal",
    "position_ids",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
    "cache_position",
    "deterministic",
}
"""Arguments of attention that are exported, or do not change its result."""


class AttentionShapes:
    """Attention of a dry run: records every layer's shape and mixes each token's own query, key and value, so that
    whatever else of the model lets tokens see each other shows. Owned by the tracing thread.
    """

    def __init__(self, masks: MaskRecorder) -> None:
        self.layers: list[LayerShape] = []
        self._masks = masks

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        num_heads, num_kv_heads = query.shape[1], key.shape[1]
        name = f"attention {len(self.layers)} ({type(module).__name__})"
        unknown = sorted(k for k, v in kwargs.items() if k not in ALLOWED and isinstance(v, torch.Tensor))
        if unknown or args:
            raise UnsupportedArchitecture(
                f"{name} hands {', '.join(unknown) or 'more'} to its attention, which is not exported yet"
            )
        # As in PyTorch's own attention, a mask that is there says it all.
        is_causal = kwargs.get("is_causal")
        is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if attention_mask is None and not is_causal:
            raise UnsupportedArchitecture(f"{name} attends in both directions; expected causal attention")
        if key.shape[-1] != query.shape[-1] or num_heads % num_kv_heads or value.shape[1] != num_kv_heads:
            raise UnsupportedArchitecture(
                f"{name} has queries, keys and values of shapes {list(query.shape)}, {list(key.shape)} and "
                f"{list(value.shape)}; expected heads that share keys and values in groups"
            )
        if key.shape[2] != query.shape[2] or value.shape[2] != query.shape[2]:
            raise UnsupportedArchitecture(
                f"{name} has {query.shape[2]} queries, but {key.shape[2]} keys; expected one key a token"
            )
        pattern = self._masks.pattern_of(attention_mask, name)
        head_size = padded_size(query.shape[-1], value.shape[-1])
        self.layers.append(LayerShape(num_heads, num_kv_heads, head_size, pattern.window, pattern.chunk))
        own = query.mean(-1, keepdim=True) + (key.mean(-1, keepdim=True) + value).repeat_interleave(
            num_heads // num_kv_heads, dim=1
        )
        return own.transpose(1, 2).contiguous(), None


class PlainAttention:
    """Attention of a second dry run: what the attention nodes compute, in PyTorch, over a prompt without a past."""

    def __init__(self, layers: Sequence[LayerShape]) -> None:
        self._layers = iter(layers)

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
        layer = next(self._layers)
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = query @ key.transpose(2, 3) * (scaling if scaling is not None else query.shape[-1] ** -0.5)
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        positions = torch.arange(query.shape[2])
        distance = positions[:, None] - positions
        seen = distance >= 0
        if layer.sliding_window is not None:
            seen &= distance < layer.sliding_window
        if layer.chunk is not None:
            seen &= positions[:, None] // layer.chunk == positions // layer.chunk
        scores = scores.masked_fill(~seen, -torch.inf)
        if s_aux is not None:
            sinks = s_aux.reshape(1, -1, 1, 1).expand(len(query), -1, query.shape[2], 1)
            scores = torch.cat((scores, sinks), dim=-1)
        weights = scores.softmax(-1)[..., : query.shape[2]]
        return (weights @ value).transpose(1, 2).contiguous(), None


class GraphAttention:
    """Attention of the traced model: one GroupQueryAttention node per layer.

    Owned by the decoder wrapper, which calls ``begin`` before the model runs and takes ``present`` afterwards: per
    layer a key and a value of (B, KV, max_len, D).
    """

    def __init__(self, layers: Sequence[LayerShape] = ()) -> None:
        self.layers = layers
        self.past: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.present: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.seqlens_k: torch.Tensor | None = None
        self.total_sequence_length: torch.Tensor | None = None
        self.position_ids: torch.Tensor | None = None
        self._biases: dict[int, torch.Tensor] = {}

    def begin(
        self,
        past: Sequence[tuple[torch.Tensor, torch.Tensor]],
        seqlens_k: torch.Tensor,
        total_sequence_length: torch.Tensor,
        position_ids: torch.Tensor,
    ) -> None:
        self.past, self.present, self._biases = list(past), [], {}
        self.seqlens_k, self.total_sequence_length = seqlens_k, total_sequence_length
        self.position_ids = position_ids

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
        position_bias: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        index = len(self.present)
        layer = self.layers[index]
        past_key, past_value = self.past[index]
        num_rows, num_heads, num_tokens, query_size = query.shape
        value_size, size = value.shape[-1], layer.head_size

        inputs: list[torch.Tensor | None] = [
            *(_packed(tensor, size) for tensor in (query, key, value)),
            past_key,
            past_value,
            self.seqlens_k,
            self.total_sequence_length,
        ]
        bias = position_bias
        if layer.chunk is not None:
            bias = self._bias(layer.chunk, past_key.shape[2])
        if s_aux is not None or bias is not None:
            # cos_cache, sin_cache, position_ids, attention_bias (B, H, S, total_sequence_length), head_sink
            inputs += [None, None, None, bias, None if s_aux is None else s_aux.reshape(-1)]
        attributes: dict[str, Any] = {"num_heads": num_heads, "kv_num_heads": layer.num_kv_heads}
        if scaling is not None or query_size != size:
            attributes["scale"] = float(scaling) if scaling is not None else query_size**-0.5
        if softcap is not None:
            attributes["softcap"] = float(softcap)
        if layer.sliding_window is not None:
            attributes["local_window_size"] = layer.sliding_window

        output, present_key, present_value = torch.onnx.ops.symbolic_multi_out(
            "com.microsoft::GroupQueryAttention",
            inputs,
            attributes,
            dtypes=(query.dtype, past_key.dtype, past_value.dtype),
            shapes=((num_rows, num_tokens, num_heads * size), past_key.shape, past_value.shape),
            version=1,
        )
        self.present.append((present_key, present_value))
        output = output.reshape(num_rows, num_tokens, num_heads, size)
        return output if value_size == size else output[..., :value_size], None

    def _bias(self, chunk: int, max_len: int) -> torch.Tensor:
        """(B, 1, S, T): 0 for keys of the query's chunk, else a number that softmax turns into 0; layers share it."""
        if chunk not in self._biases:
            assert self.position_ids is not None and self.total_sequence_length is not None
            is_same = (self.position_ids // chunk)[:, None, :, None] == torch.arange(max_len) // chunk
            bias = torch.where(is_same, 0.0, BLOCKED)
            # Cut to T keys by a node of our own: the tracer knows no sizes that are only known when running.
            ends = self.total_sequence_length.to(torch.int64).reshape(1)
            start, axis = torch.zeros(1, dtype=torch.int64), torch.full((1,), 3)
            self._biases[chunk] = torch.onnx.ops.symbolic(
                "Slice", (bias, start, ends, axis), dtype=bias.dtype, shape=bias.shape
            )
        return self._biases[chunk]


BLOCKED = -1e30


def padded_size(*sizes: int) -> int:
    """The head size that the operator takes for heads of these sizes: a multiple of 8."""
    return -(-max(sizes) // 8) * 8


def _packed(heads: torch.Tensor, size: int) -> torch.Tensor:
    """(B, N, S, D) → (B, S, N·size), each head filled up with zeros, which change no product."""
    if heads.shape[-1] < size:
        heads = torch.nn.functional.pad(heads, (0, size - heads.shape[-1]))
    num_rows, num_heads, num_tokens, _ = heads.shape
    return heads.transpose(1, 2).reshape(num_rows, num_tokens, num_heads * size)
