"""The encoder–decoder Transformer that the ``seq2seq`` recipe trains: ``torch.nn``'s own layers, with embeddings,
positions, masks and a head around them.

    source (B, S) ─ embed + position ─ TransformerEncoder ─► memory (B, S, E) ─┐ cross attention
    target (B, T) ─ embed + position ─ TransformerDecoder (causal) ◄───────────┘ ─ head ─► logits (B, T, V)

Vaswani et al., Attention Is All You Need, https://arxiv.org/abs/1706.03762. A folder holds it as config.json with
``model_type: "llmos-seq2seq"`` and model.safetensors. Needs PyTorch and safetensors and imports nothing of ours: the
exporter reads and runs the same class.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

MODEL_TYPE = "llmos-seq2seq"
CONFIG_JSON = "config.json"
WEIGHTS = "model.safetensors"
POSITIONS = ("sinusoidal", "learned")
ACTIVATIONS = ("relu", "gelu")


@dataclass(frozen=True)
class Seq2SeqTransformerConfig:
    """Sizes and form of one model; a bad value raises ValueError that names it.

    positions         ``sinusoidal`` (fixed) or ``learned``
    norm_first        norms before attention and feed-forward, and one behind each stack, instead of after each of them
    share_embeddings  source and target tokens have one table
    tie_word_embeddings  the head is the target table
    """

    vocab_size: int
    hidden_size: int = 128
    intermediate_size: int = 512
    num_encoder_layers: int = 2
    num_decoder_layers: int = 2
    num_attention_heads: int = 4
    max_position_embeddings: int = 256
    activation: str = "relu"
    positions: str = "sinusoidal"
    norm_first: bool = True
    share_embeddings: bool = True
    tie_word_embeddings: bool = True
    dropout: float = 0.1
    layer_norm_eps: float = 1e-5
    pad_token_id: int = 0
    eos_token_id: int = 0
    decoder_start_token_id: int = 0

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_encoder_layers", "num_decoder_layers"):
            self._expect(name, getattr(self, name) >= 1, "a whole number ≥ 1")
        self._expect("num_attention_heads", self.num_attention_heads >= 1, "a whole number ≥ 1")
        self._expect("max_position_embeddings", self.max_position_embeddings >= 2, "a whole number ≥ 2")
        self._expect("activation", self.activation in ACTIVATIONS, f"one of {', '.join(ACTIVATIONS)}")
        self._expect("positions", self.positions in POSITIONS, f"one of {', '.join(POSITIONS)}")
        self._expect("dropout", 0 <= self.dropout < 1, "a number from 0 to below 1")
        heads = self.num_attention_heads
        self._expect("hidden_size", self.hidden_size % (2 * heads) == 0, f"a multiple of {2 * heads}, twice the heads")
        for name in ("pad_token_id", "eos_token_id", "decoder_start_token_id"):
            self._expect(name, 0 <= getattr(self, name) < self.vocab_size, f"a token id below {self.vocab_size}")

    def _expect(self, name: str, is_good: bool, expected: str) -> None:
        if not is_good:
            raise ValueError(f"{name} has value {getattr(self, name)!r}; expected {expected}")

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Seq2SeqTransformerConfig:
        """Of what config.json holds; raises ValueError for a missing or unknown key."""
        known = {field.name for field in dataclasses.fields(cls)}
        other = {"model_type", "architectures", "is_encoder_decoder", "dtype"}
        unknown = sorted(set(values) - known - other)
        if unknown:
            raise ValueError(f"unknown key {unknown[0]!r}; known keys are {', '.join(sorted(known))}")
        if "vocab_size" not in values:
            raise ValueError("vocab_size is missing; expected the number of tokens")
        return cls(**{name: value for name, value in values.items() if name in known})


class Seq2SeqTransformer(nn.Module):
    """Masks are int or bool, 1 where there is a token; rows are padded on the right and have at least one token."""

    def __init__(self, config: Seq2SeqTransformerConfig) -> None:
        super().__init__()
        self.config = config
        size = config.hidden_size
        self.source_embeddings = nn.Embedding(config.vocab_size, size)
        self.target_embeddings = self.source_embeddings
        if not config.share_embeddings:
            self.target_embeddings = nn.Embedding(config.vocab_size, size)
        self.source_positions = _positions(config)
        self.target_positions = _positions(config)
        self.dropout = nn.Dropout(config.dropout)
        form: dict[str, Any] = {
            "d_model": size,
            "nhead": config.num_attention_heads,
            "dim_feedforward": config.intermediate_size,
            "dropout": config.dropout,
            "activation": config.activation,
            "layer_norm_eps": config.layer_norm_eps,
            "batch_first": True,
            "norm_first": config.norm_first,
        }
        norms = [nn.LayerNorm(size, config.layer_norm_eps) if config.norm_first else None for _ in range(2)]
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(**form), config.num_encoder_layers, norms[0], enable_nested_tensor=False
        )
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(**form), config.num_decoder_layers, norms[1])
        self.head = nn.Linear(size, config.vocab_size, bias=False)
        self._initialise()
        if config.tie_word_embeddings:
            self.head.weight = self.target_embeddings.weight

    def _initialise(self) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("in_proj_weight"):  # three matrices in one
                for part in parameter.chunk(3):
                    nn.init.xavier_uniform_(part)
            elif "embeddings" in name or "positions" in name or name == "head.weight":
                nn.init.normal_(parameter, std=self.config.hidden_size**-0.5)
            elif parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def forward(
        self,
        source_ids: torch.Tensor,
        source_mask: torch.Tensor,
        target_ids: torch.Tensor,
        target_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits (B, T, V) of the token after each of ``target_ids`` (B, T)."""
        return self.decode(self.encode(source_ids, source_mask), source_mask, target_ids, target_mask)

    def encode(self, source_ids: torch.Tensor, source_mask: torch.Tensor) -> torch.Tensor:
        """Memory (B, S, E)."""
        embedded = self.embed_source(source_ids, torch.arange(source_ids.shape[1], device=source_ids.device))
        return self.encoder(embedded, src_key_padding_mask=~source_mask.bool())

    def decode(
        self,
        memory: torch.Tensor,
        source_mask: torch.Tensor,
        target_ids: torch.Tensor,
        target_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        num_tokens = target_ids.shape[1]
        is_later = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=target_ids.device).triu(1)
        hidden = self.decoder(
            self.embed_target(target_ids, torch.arange(num_tokens, device=target_ids.device)),
            memory,
            tgt_mask=is_later,
            tgt_is_causal=True,
            tgt_key_padding_mask=None if target_mask is None else ~target_mask.bool(),
            memory_key_padding_mask=~source_mask.bool(),
        )
        return self.head(hidden)

    def embed_source(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """ids (B, S) at ``positions`` (S) or (B, S) → (B, S, E)."""
        scale = math.sqrt(self.config.hidden_size)
        return self.dropout(self.source_embeddings(ids) * scale + self.source_positions(positions))

    def embed_target(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        scale = math.sqrt(self.config.hidden_size)
        return self.dropout(self.target_embeddings(ids) * scale + self.target_positions(positions))

    @torch.no_grad()
    def generate(
        self,
        source_ids: torch.Tensor,
        source_mask: torch.Tensor,
        max_new_tokens: int,
        prefix: torch.Tensor | None = None,
        ignore_eos: bool = False,
    ) -> list[list[int]]:
        """The likeliest next token, again and again, all of the target computed anew each time: slow and obvious.

        ``prefix`` int64 (B, P) is what every target begins with, decoder_start_token_id if not given, and not returned.
        Each row ends before its end-of-sequence token, unless ``ignore_eos``, or after ``max_new_tokens``.
        """
        self.eval()
        memory = self.encode(source_ids, source_mask)
        if prefix is None:
            prefix = torch.full_like(source_ids[:, :1], self.config.decoder_start_token_id)
        target = prefix
        end = None if ignore_eos else self.config.eos_token_id
        for _ in range(max_new_tokens):
            token = self.decode(memory, source_mask, target)[:, -1].argmax(dim=-1)
            target = torch.cat((target, token[:, None]), dim=1)
            if end is not None and (target[:, prefix.shape[1] :] == end).any(dim=1).all():
                break
        return [_until(row, end) for row in target[:, prefix.shape[1] :].tolist()]

    def save(self, folder: Path) -> None:
        """Write config.json and model.safetensors into ``folder``; weights that are one tensor are written once."""
        document = {
            "model_type": MODEL_TYPE,
            "architectures": [type(self).__name__],
            "is_encoder_decoder": True,
            **dataclasses.asdict(self.config),
        }
        (folder / CONFIG_JSON).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        weights = {name: weight.contiguous() for name, weight in self.state_dict().items() if name not in self._tied()}
        save_file(weights, folder / WEIGHTS, {"format": "pt"})

    @classmethod
    def load(cls, folder: Path) -> Seq2SeqTransformer:
        """Read what ``save`` wrote, in float32, ready to run; raises ValueError or OSError if it does not fit."""
        document = json.loads((folder / CONFIG_JSON).read_text(encoding="utf-8"))
        if not isinstance(document, dict) or document.get("model_type") != MODEL_TYPE:
            found = document.get("model_type") if isinstance(document, dict) else None
            raise ValueError(f"{folder / CONFIG_JSON} has model_type {found!r}; expected {MODEL_TYPE!r}")
        try:
            model = cls(Seq2SeqTransformerConfig.from_mapping(document))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{folder / CONFIG_JSON}: {error}") from error
        weights = load_file(folder / WEIGHTS)
        expected = {name: weight.shape for name, weight in model.state_dict().items() if name not in model._tied()}
        for name in sorted({*expected, *weights}):
            shapes = [list(of[name].shape) if name in of else None for of in (weights, model.state_dict())]
            if name not in expected or shapes[0] != shapes[1]:
                raise ValueError(
                    f"weight {name} has shape {shapes[0]} in {folder / WEIGHTS}; {CONFIG_JSON} expects {shapes[1]}: "
                    "use the files that belong together"
                )
        model.load_state_dict(weights, strict=False)
        return model.float().eval()

    def _tied(self) -> set[str]:
        """Names in the state dict that are another name's tensor."""
        tied = {"target_embeddings.weight"} if self.config.share_embeddings else set()
        return tied | ({"head.weight"} if self.config.tie_word_embeddings else set())


class SinusoidalPositions(nn.Module):
    """positions → (…, E): sines in the first half of the features, cosines in the second; nothing is learned."""

    def __init__(self, num_positions: int, size: int) -> None:
        super().__init__()
        frequencies = torch.exp(torch.arange(0, size, 2) * (-math.log(10000.0) / size))
        angles = torch.arange(num_positions)[:, None] * frequencies
        self.register_buffer("table", torch.cat((angles.sin(), angles.cos()), dim=-1), persistent=False)

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        return nn.functional.embedding(positions, self.get_buffer("table"))


def _positions(config: Seq2SeqTransformerConfig) -> nn.Module:
    if config.positions == "learned":
        return nn.Embedding(config.max_position_embeddings, config.hidden_size)
    return SinusoidalPositions(config.max_position_embeddings, config.hidden_size)


def _until(tokens: list[int], end: int | None) -> list[int]:
    return tokens[: tokens.index(end)] if end is not None and end in tokens else tokens
