"""The encoder graph: a model that reads a text in both directions, with the pooling that makes it one embedding.

    input_ids       int64 (B, S)      →   last_hidden_state   float32 (B, S, E)
    attention_mask  int64 (B, S)          embeddings          float32 (B, E')

Rows are padded on the right; what ``input_ids`` holds under the padding does not matter. Models with transformers'
attention interface emit one ``com.microsoft.MultiHeadAttention`` node per layer, which takes the padding as lengths of
keys and anything else that the model's mask says (windows, causality, position biases) as a bias of its scores.
Other models are traced with their own attention.

Operator: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MultiHeadAttention
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModel, PreTrainedModel
from transformers.masking_utils import bidirectional_mask_function, eager_mask
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from exporters.attention import registered
from exporters.checkpoint import Checkpoint
from exporters.errors import InvalidCheckpoint, UnsupportedArchitecture, reason_of
from exporters.original import SAFE_LOADING, kind_of, read_config
from exporters.pooling import ACTIVATIONS, MODULES_JSON, Pooling
from exporters.tracing import trace_module
from triton_backend.config import LayerConfig

if TYPE_CHECKING:
    from torch.onnx import ONNXProgram

MAX_PADDING_DIFFERENCE = 1e-3
EXAMPLE_ROWS, EXAMPLE_TOKENS = 3, 5
"""Sizes that occur nowhere else, so that the tracer cannot mistake one for another."""


@dataclass(frozen=True)
class EncoderShape:
    """Facts about an encoder: E of its token vectors, E' of its embeddings, and the longest text in tokens.

    ``has_attention_nodes``: every layer goes through transformers' attention interface.
    """

    layers: tuple[LayerConfig, ...]
    hidden_size: int
    embedding_size: int
    max_tokens: int
    vocab_size: int
    has_attention_nodes: bool


class BidirectionalAttention:
    """Attention of the traced model: one MultiHeadAttention node per call. Owned by the wrapper, which fills
    ``key_padding_mask``, int32 (B, S), before the model runs; ``shapes`` are the sizes of the calls so far.
    """

    def __init__(self) -> None:
        self.key_padding_mask: torch.Tensor | None = None
        self.shapes: list[LayerConfig] = []

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        position_bias: torch.Tensor | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        for name, given in (("soft caps on scores", softcap), ("attention sinks", s_aux)):
            if given is not None:
                raise UnsupportedArchitecture(
                    f"{type(module).__name__} has {name}, which MultiHeadAttention does not compute; "
                    "expected plain attention"
                )
        num_rows, num_heads, num_tokens, head_size = query.shape
        self.shapes.append(LayerConfig(key.shape[1], head_size))
        if key.shape[1] != num_heads:  # the operator knows no groups
            key, value = (part.repeat_interleave(num_heads // key.shape[1], dim=1) for part in (key, value))
        bias = attention_mask
        if position_bias is not None:
            bias = position_bias if bias is None else position_bias + bias
        if bias is not None and isinstance(bias.shape[2], int) and bias.shape[2] == 1:
            bias = bias.expand(-1, -1, num_tokens, -1)  # the operator repeats it over rows and heads, not over tokens
        width = num_heads * value.shape[-1]
        output = torch.onnx.ops.symbolic(
            "com.microsoft::MultiHeadAttention",
            (
                query.transpose(1, 2).reshape(num_rows, num_tokens, num_heads * head_size),
                key.transpose(1, 2).reshape(num_rows, num_tokens, num_heads * head_size),
                value.transpose(1, 2).reshape(num_rows, num_tokens, width),
                None,
                self.key_padding_mask,
                bias,
            ),
            {"num_heads": num_heads, "scale": float(head_size**-0.5 if scaling is None else scaling)},
            dtype=query.dtype,
            shape=(num_rows, num_tokens, width),
            version=1,
        )
        return output.reshape(num_rows, num_tokens, num_heads, value.shape[-1]), None


def _mask(mask_function: Callable[..., Any], **kwargs: Any) -> torch.Tensor | None:
    """What a layer may see, without the padding, as a bias (1 or B, 1, S, S); None if that is everything."""
    if mask_function is bidirectional_mask_function:
        return None
    kwargs["allow_is_bidirectional_skip"] = False
    return eager_mask(mask_function=mask_function, **{**kwargs, "attention_mask": None, "batch_size": 1})


class EmbeddingStep(torch.nn.Module):
    """Token vectors and embeddings of B texts of up to S tokens."""

    def __init__(self, model: PreTrainedModel, pooling: Pooling, attention: BidirectionalAttention) -> None:
        super().__init__()
        self.model = model
        self.pooling = pooling
        self.attention = attention
        self.dense = torch.nn.ModuleList()
        for layer in pooling.dense:
            linear = torch.nn.Linear(layer.weight.shape[1], layer.weight.shape[0], layer.bias is not None)
            linear.weight = torch.nn.Parameter(layer.weight)
            if layer.bias is not None:
                linear.bias = torch.nn.Parameter(layer.bias)
            self.dense.append(torch.nn.Sequential(linear, ACTIVATIONS[layer.activation]()))
        self._pad_token_id = pad_token_id_of(model)
        self._extra = _extra_inputs(model)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # Some models count positions by what is not the padding token.
        input_ids = torch.where(attention_mask > 0, input_ids, self._pad_token_id)
        self.attention.key_padding_mask = attention_mask.to(torch.int32)
        extra = {name: torch.zeros_like(input_ids) for name in self._extra}
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, **extra)[0].float()  # (B, S, E)
        return hidden, self.embed(hidden, attention_mask)

    def embed(self, hidden: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """(B, S, E) → (B, E'). A row without any token has some finite embedding."""
        weight = attention_mask.unsqueeze(-1).to(hidden.dtype)  # (B, S, 1)
        if self.pooling.mode == "mean":
            pooled = (hidden * weight).sum(1) / weight.sum(1).clamp(min=1e-9)
        elif self.pooling.mode == "cls":
            pooled = hidden[:, 0]
        elif self.pooling.mode == "last":
            positions = torch.arange(hidden.shape[1], device=hidden.device)
            last = (attention_mask * positions).max(dim=1).values  # (B)
            pooled = torch.gather(hidden, 1, last.reshape(-1, 1, 1).expand(-1, 1, hidden.shape[-1]))[:, 0]
        else:
            pooled = torch.where(weight > 0, hidden, -1e9).max(dim=1).values
        for layer in self.dense:
            pooled = layer(pooled)
        return torch.nn.functional.normalize(pooled, dim=-1) if self.pooling.normalize else pooled


def is_encoder(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint is to be exported for its embeddings: a sentence-transformers folder, of whatever model,
    or an encoder of transformers.
    """
    return (checkpoint.folder / MODULES_JSON).exists() or kind_of(read_config(checkpoint)) == "encoder"


def load_encoder(checkpoint: Checkpoint) -> PreTrainedModel:
    """The checkpoint's model without any head, in fp32; raises ExportError with the reason if that cannot be."""
    config = read_config(checkpoint)
    if config.is_encoder_decoder or type(config) not in MODEL_MAPPING:
        raise UnsupportedArchitecture(
            f"model_type {checkpoint.model_type!r} is no encoder-only model of transformers; expected one such as bert"
        )
    try:
        loaded: Any = AutoModel.from_pretrained(
            checkpoint.folder,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below by name, instead of by the first one only
            **SAFE_LOADING,
        )
    except Exception as error:  # whatever a bad value of config.json leads to
        raise InvalidCheckpoint(f"transformers cannot load {checkpoint.folder}: {reason_of(error)}") from error
    model, info = loaded
    # The pooler is a head for classification, which embeddings do not use and many checkpoints leave out.
    missing = sorted(name for name in info["missing_keys"] if not name.startswith("pooler."))
    if info["mismatched_keys"]:
        name, found, expected = sorted(info["mismatched_keys"])[0][:3]
        raise InvalidCheckpoint(
            f"weight {name} has shape {list(found)} in {checkpoint.folder}; its config.json expects {list(expected)} "
            f"({len(info['mismatched_keys'])} such weights): use the config.json that belongs to these weights"
        )
    if missing:
        raise InvalidCheckpoint(
            f"{checkpoint.folder} lacks {len(missing)} weights that its config.json expects: "
            f"{', '.join(missing[:5])}{', …' if len(missing) > 5 else ''}; use the config.json that belongs to these "
            "weights, or download the checkpoint again"
        )
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all() and not name.startswith("pooler."):
            raise InvalidCheckpoint(
                f"weight {name} has NaN or infinite values; expected finite numbers: the training that wrote "
                "it diverged or the file is damaged, use an earlier checkpoint"
            )
    return model.eval()


def measure(model: PreTrainedModel, pooling: Pooling) -> EncoderShape:
    """Sizes of the encoder, from one dry run; raises UnsupportedArchitecture if it gives no token vectors."""
    attention = BidirectionalAttention()
    step = EmbeddingStep(model, pooling, attention).eval()
    ids = torch.full((1, 2), min(5, model.config.vocab_size - 1))
    with _own_attention(model, attention) as has_interface, torch.no_grad():
        hidden, embeddings = step(ids, torch.ones_like(ids))
    if hidden.dim() != 3 or hidden.shape[:2] != ids.shape:
        raise UnsupportedArchitecture(
            f"{type(model).__name__} gives {list(hidden.shape)} for {list(ids.shape)} tokens; expected a vector each"
        )
    _check_padding(model)
    return EncoderShape(
        layers=tuple(attention.shapes),
        hidden_size=hidden.shape[-1],
        embedding_size=embeddings.shape[-1],
        max_tokens=_max_tokens(model),
        vocab_size=model.config.vocab_size,
        has_attention_nodes=has_interface and bool(attention.shapes),
    )


def trace(model: PreTrainedModel, pooling: Pooling) -> ONNXProgram:
    """Trace ``model`` and ``pooling`` into one ONNX graph with dynamic B and S. The weights are shared, not copied."""
    attention = BidirectionalAttention()
    step = EmbeddingStep(model, pooling, attention).eval()
    ids = torch.full((EXAMPLE_ROWS, EXAMPLE_TOKENS), min(5, model.config.vocab_size - 1))
    axes = {0: "batch", 1: "sequence"}
    with _own_attention(model, attention):
        return trace_module(
            model,
            step,
            {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
            {"input_ids": axes, "attention_mask": axes},
            ["input_ids", "attention_mask"],
            ["last_hidden_state", "embeddings"],
        )


@contextmanager
def _own_attention(model: PreTrainedModel, attention: BidirectionalAttention) -> Iterator[bool]:
    """While open, ``model`` has an attention that can be traced; yields whether it is ours."""
    before = model.config._attn_implementation
    with ExitStack() as stack:
        try:
            stack.enter_context(registered(model, attention, _mask))
            has_interface = True
        except (UnsupportedArchitecture, ValueError):
            # Written with its own attention; the eager form has no branches that look at data.
            model.set_attn_implementation("eager")
            stack.callback(model.set_attn_implementation, before)
            has_interface = False
        yield has_interface


def _check_padding(model: PreTrainedModel) -> None:
    """Refuse models whose token vectors depend on the padding behind them: such a text has no embedding of its own."""
    ids = torch.arange(3, 9).unsqueeze(0) % model.config.vocab_size
    mask = torch.tensor([[1, 1, 1, 0, 0, 0]])
    padded = torch.where(mask > 0, ids, pad_token_id_of(model))
    with torch.no_grad():
        alone = model(input_ids=ids[:, :3], attention_mask=mask[:, :3])[0]
        beside = model(input_ids=padded, attention_mask=mask)[0][:, :3]
    difference = float((alone - beside).abs().max() / alone.abs().max().clamp(min=1e-9))
    if difference > MAX_PADDING_DIFFERENCE:
        raise UnsupportedArchitecture(
            f"{type(model).__name__} gives a text other vectors when padding follows it (relative difference "
            f"{difference:.2g}, in PyTorch too): it mixes neighbouring tokens without looking at the attention "
            "mask, so results would depend on what a text is batched with"
        )


def _extra_inputs(model: PreTrainedModel) -> tuple[str, ...]:
    """Inputs that are zero for a single text."""
    return tuple(name for name in ("token_type_ids",) if name in inspect.signature(model.forward).parameters)


def pad_token_id_of(model: PreTrainedModel) -> int:
    pad_token_id = getattr(model.config, "pad_token_id", None)
    return pad_token_id if isinstance(pad_token_id, int) and 0 <= pad_token_id < model.config.vocab_size else 0


def _max_tokens(model: PreTrainedModel) -> int:
    """Positions that the model has; those of the RoBERTa family begin behind the padding token's id."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        raise UnsupportedArchitecture(
            f"{type(model).__name__} has max_position_embeddings {positions!r}; expected the longest text in tokens"
        )
    for name, module in model.named_modules():
        is_table = name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding)
        if is_table and module.padding_idx is not None:
            return module.num_embeddings - module.padding_idx - 1
    return positions
