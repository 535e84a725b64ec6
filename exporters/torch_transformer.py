"""Our own encoder–decoder of ``torch.nn`` layers in the form that models of transformers have.

A checkpoint with model_type ``llmos-seq2seq`` holds a ``Seq2SeqTransformer``, which keeps its three projections of an
attention in one matrix and computes attention inside of ``torch.nn``. Here the same weights (shared, not copied) are
arranged as transformers does, with its attention interface, so that such a model is measured, traced and fused like
any other encoder–decoder. ``register`` makes transformers' Auto classes know it. Its ``generate`` is that of the
original, which has none of the code here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForSeq2SeqLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from control_plane.training.recipes.seq2seq_transformer import (
    MODEL_TYPE,
    Seq2SeqTransformer,
    Seq2SeqTransformerConfig,
)

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"relu": functional.relu, "gelu": functional.gelu}


class TorchTransformerConfig(PreTrainedConfig):
    """config.json as transformers reads it: the fields of ``Seq2SeqTransformerConfig`` as attributes."""

    model_type = MODEL_TYPE


class Attention(nn.Module):
    """One ``nn.MultiheadAttention`` through the attention interface; ``layer_idx`` is the number of its layer."""

    def __init__(self, original: nn.MultiheadAttention, config: PreTrainedConfig, layer_idx: int, is_causal: bool):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = is_causal
        self.head_size = original.head_dim
        self.scaling = original.head_dim**-0.5
        assert original.in_proj_weight is not None
        parts = (original.in_proj_weight.chunk(3), original.in_proj_bias.chunk(3))
        self.q_proj, self.k_proj, self.v_proj = (_linear(*part) for part in zip(*parts, strict=True))
        self.out_proj = original.out_proj

    def forward(
        self, hidden: torch.Tensor, source: torch.Tensor | None = None, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(B, S, E) attends to itself, or to ``source`` (B, T, E), where ``mask`` (B, 1, 1, T) is True."""
        read = hidden if source is None else source
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, sdpa_attention_forward)
        output, _ = attend(
            self,
            self._heads(self.q_proj(hidden)),
            self._heads(self.k_proj(read)),
            self._heads(self.v_proj(read)),
            mask,
            scaling=self.scaling,
            is_causal=self.is_causal,
        )
        return self.out_proj(output.reshape(*hidden.shape[:2], -1))

    def _heads(self, features: torch.Tensor) -> torch.Tensor:
        return features.view(*features.shape[:2], -1, self.head_size).transpose(1, 2)


class Layer(nn.Module):
    """One layer of either stack; those of the decoder have ``cross_attn``. Norms keep their place in the original."""

    def __init__(
        self,
        original: nn.TransformerEncoderLayer | nn.TransformerDecoderLayer,
        config: PreTrainedConfig,
        layer_idx: int,
    ) -> None:
        super().__init__()
        is_decoder = isinstance(original, nn.TransformerDecoderLayer)
        self.norm_first = original.norm_first
        self.activation = ACTIVATIONS[config.activation]
        self.self_attn = Attention(original.self_attn, config, layer_idx, is_causal=is_decoder)
        self.norm1, self.norm2 = original.norm1, original.norm2
        if isinstance(original, nn.TransformerDecoderLayer):
            self.cross_attn = Attention(original.multihead_attn, config, layer_idx, is_causal=False)
            self.norm3 = original.norm3
        self.linear1, self.linear2 = original.linear1, original.linear2

    def forward(
        self, hidden: torch.Tensor, source: torch.Tensor | None = None, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        blocks: list[Callable[[torch.Tensor], torch.Tensor]] = []
        if source is None:
            blocks = [lambda x: self.self_attn(x, mask=mask), self._feed_forward]
        else:
            blocks = [self.self_attn, lambda x: self.cross_attn(x, source, mask), self._feed_forward]
        norms = [self.norm1, self.norm2] if source is None else [self.norm1, self.norm2, self.norm3]
        for norm, block in zip(norms, blocks, strict=True):
            hidden = hidden + block(norm(hidden)) if self.norm_first else norm(hidden + block(hidden))
        return hidden

    def _feed_forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.linear2(self.activation(self.linear1(hidden)))


class Stack(nn.Module):
    """Encoder or decoder, with the embedding of its tokens."""

    def __init__(
        self,
        original: nn.TransformerEncoder | nn.TransformerDecoder,
        tokens: nn.Embedding,
        positions: nn.Module,
        config: PreTrainedConfig,
    ) -> None:
        super().__init__()
        self.config = config
        # A module of its own, though of the same weight: the tracer wraps modules that are found at two places, and
        # attention modules inside of such a wrapper are no longer those that were measured.
        self.embed_tokens = nn.Embedding(tokens.num_embeddings, tokens.embedding_dim, device="meta")
        self.embed_tokens.weight = tokens.weight
        self.embed_positions = positions
        self.scale = config.hidden_size**0.5
        self.layers = nn.ModuleList(Layer(layer, config, index) for index, layer in enumerate(original.layers))
        self.norm = original.norm

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        source: torch.Tensor | None = None,
    ) -> BaseModelOutput:
        """``attention_mask`` (B, T) is of the tokens themselves, or of ``source`` (B, T, E) if that is given."""
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)
        hidden = self.embed_tokens(input_ids) * self.scale + self.embed_positions(position_ids)
        mask = None if attention_mask is None else attention_mask.bool()[:, None, None]
        for layer in self.layers:
            hidden = layer(hidden, source, mask)
        return BaseModelOutput(last_hidden_state=hidden if self.norm is None else self.norm(hidden))


class TorchTransformerForSeq2SeqLM(PreTrainedModel):
    """A ``Seq2SeqTransformer`` as transformers' models are."""

    config_class = TorchTransformerConfig
    base_model_prefix = "model"
    _supports_sdpa = True

    def __init__(self, config: TorchTransformerConfig, original: Seq2SeqTransformer | None = None) -> None:
        super().__init__(config)
        if original is None:
            original = Seq2SeqTransformer(Seq2SeqTransformerConfig.from_mapping(_fields(config)))
        self._original = (original,)  # a tuple, so that its modules are not listed a second time
        embeddings = (original.source_embeddings, original.target_embeddings)
        self.encoder = Stack(original.encoder, embeddings[0], original.source_positions, config)
        self.decoder = Stack(original.decoder, embeddings[1], original.target_positions, config)
        self.lm_head = original.head
        self.generation_config = GenerationConfig(
            decoder_start_token_id=original.config.decoder_start_token_id,
            eos_token_id=original.config.eos_token_id,
            pad_token_id=original.config.pad_token_id,
        )

    @classmethod
    def from_pretrained(cls, folder: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """As transformers' own, for a local folder in safetensors form and float32; raises ValueError or OSError."""
        original = Seq2SeqTransformer.load(Path(folder))
        model = cls(config or TorchTransformerConfig.from_pretrained(folder), original).eval()
        if (Path(folder) / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        # A weight that is missing, unexpected or of another shape was an error already.
        info: dict[str, Any] = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set()}
        return (model, info) if kwargs.get("output_loading_info") else model

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_position_ids: torch.Tensor | None = None,
        encoder_outputs: BaseModelOutput | Sequence[torch.Tensor] | None = None,
        use_cache: bool = False,
    ) -> Seq2SeqLMOutput:
        """Logits (B, S, V). There is no cache: ``use_cache`` is accepted and means nothing."""
        source = self.encoder(input_ids, attention_mask)[0] if encoder_outputs is None else encoder_outputs[0]
        hidden = self.decoder(decoder_input_ids, attention_mask, decoder_position_ids, source)[0]
        return Seq2SeqLMOutput(logits=self.lm_head(hidden), encoder_last_hidden_state=source)

    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        generation_config: Any = None,
        decoder_input_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Greedy tokens of the original (B, P + new), after ``decoder_input_ids`` (B, P); shorter rows are padded."""
        settings = generation_config or self.generation_config
        config = self._original[0].config
        if decoder_input_ids is None:
            decoder_input_ids = torch.full_like(input_ids[:, :1], config.decoder_start_token_id)
        rows = self._original[0].generate(
            input_ids,
            torch.ones_like(input_ids) if attention_mask is None else attention_mask,
            kwargs.get("max_new_tokens") or getattr(settings, "max_new_tokens", None) or 20,
            decoder_input_ids,
            ignore_eos=getattr(settings, "eos_token_id", None) is None,
        )
        longest = max(map(len, rows))
        padded = [[*row, *[config.pad_token_id] * (longest - len(row))] for row in rows]
        return torch.cat((decoder_input_ids, torch.tensor(padded, dtype=torch.int64).reshape(len(rows), -1)), dim=1)

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        return self.encoder

    def get_decoder(self) -> nn.Module:
        return self.decoder

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


def register() -> None:
    """Let AutoConfig and AutoModelForSeq2SeqLM know the model type; safe to repeat."""
    AutoConfig.register(MODEL_TYPE, TorchTransformerConfig, exist_ok=True)
    AutoModelForSeq2SeqLM.register(TorchTransformerConfig, TorchTransformerForSeq2SeqLM, exist_ok=True)


def _fields(config: PreTrainedConfig) -> dict[str, Any]:
    """What of ``config`` the original knows."""
    return {name: getattr(config, name) for name in Seq2SeqTransformerConfig.__dataclass_fields__}


def _linear(weight: torch.Tensor, bias: torch.Tensor) -> nn.Linear:
    """A layer over a part of a larger matrix, in the same memory."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight, linear.bias = (nn.Parameter(part.detach(), requires_grad=False) for part in (weight, bias))
    return linear
