"""Version folders of every kind that the engine serves, from one tiny PyTorch model that keeps to the graph contract.

``TinyModel`` is its own slow, obvious truth: ``greedy`` computes everything anew for every token, in plain PyTorch.
``write_version`` traces the same weights with attention over cache rows, cross attention over masked source rows, and
adapters gathered by row, each only where asked for.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from triton_backend.config import EngineConfig, LayerConfig, LoraConfig, LoraTarget, ModelConfig, VersionConfig

WIDTH, NUM_HEADS, NUM_LAYERS, HEAD_SIZE = 32, 2, 2, 16
MAX_MODEL_LEN, MAX_SOURCE_LEN, NUM_TOP_LOGITS = 64, 48, 32
START_ID = 3

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""layer, query, key and value (B, S, WIDTH) → (B, S, WIDTH)."""


class TinyLayer(nn.Module):
    def __init__(self, has_cross: bool) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.query, self.key, self.value, self.output = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        if has_cross:
            self.cross_query, self.cross_key, self.cross_value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))


class TinyModel(nn.Module):
    """Decoder of pre-norm layers; with ``has_cross`` also an encoder: the embedded source, mixed by one layer."""

    def __init__(self, vocab_size: int, has_cross: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.has_cross = has_cross
        self.tokens, self.positions = nn.Embedding(vocab_size, WIDTH), nn.Embedding(MAX_MODEL_LEN, WIDTH)
        self.layers = nn.ModuleList(TinyLayer(has_cross) for _ in range(NUM_LAYERS))
        self.head = nn.Linear(WIDTH, vocab_size)
        self.mixer = nn.Linear(WIDTH, WIDTH)
        for weight in self.parameters():
            if weight.ndim == 2:
                nn.init.normal_(weight, std=0.4)
        self.eval()

    def cross_states(self, source_ids: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Per layer keys and values (B, H, S, D) of a source (B, S)."""
        hidden = self.tokens(source_ids)
        mean = hidden.mean(dim=1, keepdim=True)  # so that every state depends on the whole source
        hidden = hidden + torch.tanh(self.mixer(hidden + mean))
        return [(heads(layer.cross_key(hidden)), heads(layer.cross_value(hidden))) for layer in self.layers]

    def decode(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        attend: Attend,
        attend_source: Attend | None = None,
        adapt: Callable[[str, torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Hidden states (B, S, WIDTH)."""
        hidden = self.tokens(input_ids) + self.positions(position_ids)
        for index, layer in enumerate(self.layers):
            normed = layer.norms[0](hidden)
            query = layer.query(normed)
            if adapt is not None:
                query = query + adapt(f"layers.{index}.query", normed)
            hidden = hidden + layer.output(attend(index, query, layer.key(normed), layer.value(normed)))
            if attend_source is not None:
                query = layer.cross_query(layer.norms[1](hidden))
                hidden = hidden + attend_source(index, query, query, query)
            hidden = hidden + layer.down(F.gelu(layer.up(layer.norms[2](hidden))))
        return hidden

    @torch.no_grad()
    def greedy(
        self,
        prompt_ids: Sequence[int],
        num_new: int,
        source_ids: Sequence[int] = (),
        adapter: dict[str, Any] | None = None,
    ) -> list[int]:
        """New tokens after ``prompt_ids``."""
        ids = list(prompt_ids)
        cross = self.cross_states(torch.tensor([source_ids])) if self.has_cross else []

        def attend(layer: int, *parts: torch.Tensor) -> torch.Tensor:
            return flat(F.scaled_dot_product_attention(*map(heads, parts), is_causal=True))

        def attend_source(layer: int, query: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
            return flat(F.scaled_dot_product_attention(heads(query), *cross[layer]))

        def adapt(name: str, x: torch.Tensor) -> torch.Tensor:
            a, b = (torch.from_numpy(adapter[f"lora.{name}.{part}"]) for part in ("a", "b"))
            return x @ a @ b

        for _ in range(num_new):
            hidden = self.decode(
                torch.tensor([ids]),
                torch.arange(len(ids))[None],
                attend,
                attend_source if self.has_cross else None,
                adapt if adapter else None,
            )
            ids.append(int(self.head(hidden[0, -1]).argmax()))
        return ids[len(prompt_ids) :]


def heads(x: torch.Tensor) -> torch.Tensor:
    """(B, S, WIDTH) → (B, H, S, D)."""
    return x.unflatten(2, (NUM_HEADS, HEAD_SIZE)).transpose(1, 2)


def flat(x: torch.Tensor) -> torch.Tensor:
    """(B, H, S, D) → (B, S, WIDTH)."""
    return x.transpose(1, 2).flatten(2)


class EncoderGraph(nn.Module):
    def __init__(self, model: TinyModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return self.model.cross_states(input_ids)


class DecoderGraph(nn.Module):
    def __init__(self, model: TinyModel, lora: LoraConfig | None) -> None:
        super().__init__()
        self.model = model
        self.lora = lora

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        seqlens_k: torch.Tensor,
        total_sequence_length: torch.Tensor,
        logits_index: torch.Tensor,
        past_key_values: list[tuple[torch.Tensor, torch.Tensor]],
        cross: list[tuple[torch.Tensor, torch.Tensor]],
        source_lens: torch.Tensor | None,
        lora: list[tuple[torch.Tensor, torch.Tensor]],
        adapter_ids: torch.Tensor | None,
    ) -> Any:
        present = []

        def attend(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            past = past_key_values[layer]
            output, *kept = torch.onnx.ops.symbolic_multi_out(
                "com.microsoft::GroupQueryAttention",
                [query, key, value, *past, seqlens_k, total_sequence_length],
                {"num_heads": NUM_HEADS, "kv_num_heads": NUM_HEADS},
                dtypes=(query.dtype, query.dtype, query.dtype),
                shapes=(query.shape, past[0].shape, past[1].shape),
                version=1,
            )
            present.append(tuple(kept))
            return output

        def attend_source(layer: int, query: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
            key, value = cross[layer]
            scores = heads(query) @ key.transpose(2, 3) / HEAD_SIZE**0.5  # (B, H, S, max_source_len)
            is_behind = torch.arange(key.shape[2]) >= source_lens[:, None]
            scores = scores.masked_fill(is_behind[:, None, None, :], float("-inf"))
            return flat(torch.softmax(scores, dim=-1) @ value)

        def adapt(name: str, x: torch.Tensor) -> torch.Tensor:
            assert self.lora is not None
            a, b = lora[[target.name for target in self.lora.targets].index(name)]
            return x @ a[adapter_ids] @ b[adapter_ids]

        hidden = self.model.decode(
            input_ids, position_ids, attend, attend_source if cross else None, adapt if lora else None
        )
        logits = self.model.head(torch.index_select(hidden.reshape(-1, WIDTH), 0, logits_index)).float()
        top_logits, top_ids = torch.topk(logits, NUM_TOP_LOGITS, dim=-1)
        return logits, top_logits, top_ids, present


def write_version(
    folder: Path,
    model: TinyModel,
    tokenizer_folder: Path,
    *,
    cache_type: str = "fp32",
    lora: LoraConfig | None = None,
    **engine: Any,
) -> Path:
    """A version folder without a seal, for rows of MAX_MODEL_LEN and sources of MAX_SOURCE_LEN tokens."""
    folder.mkdir()
    if model.has_cross:
        _export_encoder(model, folder)
    _export_decoder(model, lora, torch.float16 if cache_type == "fp16" else torch.float32, folder)
    layers = (LayerConfig(NUM_HEADS, HEAD_SIZE),) * NUM_LAYERS
    facts: dict[str, Any] = {}
    if model.has_cross:
        facts = {
            "kind": "encoder_decoder",
            "encoder_graph": "encoder.onnx",
            "cross_layers": layers,
            "decoder_start_token_id": START_ID,
        }
        engine.setdefault("max_source_len", MAX_SOURCE_LEN)
    config = ModelConfig(
        architecture="Tiny",
        model_type="tiny",
        vocab_size=model.head.out_features,
        max_position_embeddings=MAX_MODEL_LEN,
        layers=layers,
        num_top_logits=NUM_TOP_LOGITS,
        eos_token_ids=(0,),
        precision=cache_type,
        cache_type=cache_type,
        lora=lora,
        **facts,
    )
    VersionConfig(config, EngineConfig(MAX_MODEL_LEN, **{"max_num_seqs": 8, **engine})).write(folder)
    shutil.copy(tokenizer_folder / "tokenizer.json", folder)
    return folder


def edited(version: Path, folder: Path, **facts: Any) -> Path:
    """A copy of a version with other facts in its model.json."""
    shutil.copytree(version, folder)
    config = VersionConfig.read(version)
    VersionConfig(dataclasses.replace(config.model, **facts), config.engine).write(folder)
    return folder


def lora_config(num_slots: int, rank: int) -> LoraConfig:
    """Adapters on every layer's query."""
    targets = (LoraTarget(f"layers.{layer}.query", WIDTH, WIDTH) for layer in range(NUM_LAYERS))
    return LoraConfig(num_slots, rank, tuple(targets))


def _export_encoder(model: TinyModel, folder: Path) -> None:
    ids = torch.ones((1, 5), dtype=torch.int64)
    names = [f"cross.{layer}.{part}" for layer in range(NUM_LAYERS) for part in ("key", "value")]
    inputs = {"input_ids": ids, "attention_mask": ids.clone()}  # the tracer takes one tensor for one input
    axes = {name: {0: "batch", 1: "sequence"} for name in inputs}
    _export(EncoderGraph(model), inputs, axes, list(inputs), names, folder / "encoder.onnx")


def _export_decoder(model: TinyModel, lora: LoraConfig | None, dtype: torch.dtype, folder: Path) -> None:
    num_rows, num_tokens = 3, 5

    def cache(length: int) -> list[tuple[torch.Tensor, ...]]:
        shape = (num_rows, NUM_HEADS, length, HEAD_SIZE)
        return [tuple(torch.zeros(shape, dtype=dtype) for _ in ("key", "value")) for _ in range(NUM_LAYERS)]

    slots, rank = (lora.num_slots + 1, lora.rank) if lora else (0, 0)
    inputs: dict[str, Any] = {
        "input_ids": torch.ones((num_rows, num_tokens), dtype=torch.int64),
        "position_ids": torch.arange(num_tokens).expand(num_rows, -1).clone(),
        "seqlens_k": torch.full((num_rows,), num_tokens - 1, dtype=torch.int32),
        "total_sequence_length": torch.tensor(num_tokens, dtype=torch.int32),
        "logits_index": torch.arange(num_rows * num_tokens - 2),
        "past_key_values": cache(23),
        "cross": cache(29) if model.has_cross else [],
        "source_lens": torch.ones(num_rows, dtype=torch.int32) if model.has_cross else None,
        "lora": [(torch.zeros(slots, WIDTH, rank), torch.zeros(slots, rank, WIDTH)) for _ in range(NUM_LAYERS)]
        if lora
        else [],
        "adapter_ids": torch.zeros(num_rows, dtype=torch.int64) if lora else None,
    }
    row, token = {0: "batch"}, {0: "batch", 1: "sequence"}
    past, source = {0: "batch", 2: "max_len"}, {0: "batch", 2: "max_source_len"}
    axes: dict[str, Any] = {
        "input_ids": token,
        "position_ids": token,
        "seqlens_k": row,
        "total_sequence_length": {},
        "logits_index": {0: "positions"},
        "past_key_values": [(past, past)] * NUM_LAYERS,
        "cross": [(source, source)] * NUM_LAYERS if model.has_cross else [],
        "source_lens": row if model.has_cross else None,
        "lora": [({}, {})] * NUM_LAYERS if lora else [],
        "adapter_ids": row if lora else None,
    }
    names: list[str] = []
    for name, value in inputs.items():
        if name == "lora" and lora:
            names += [f"lora.{target.name}.{part}" for target in lora.targets for part in ("a", "b")]
        elif isinstance(value, list):
            names += [f"{name}.{layer}.{part}" for layer in range(len(value)) for part in ("key", "value")]
        elif value is not None:
            names.append(name)
    present = [f"present.{layer}.{part}" for layer in range(NUM_LAYERS) for part in ("key", "value")]
    decoder = DecoderGraph(model, lora).to(dtype)
    _export(decoder, inputs, axes, names, ["logits", "top_logits", "top_ids", *present], folder / "model.onnx")
    model.float()


def _export(module: nn.Module, inputs: Any, axes: Any, input_names: Any, output_names: Any, path: Path) -> None:
    with torch.no_grad():
        program = torch.onnx.export(
            module.eval(),
            kwargs=inputs,
            dynamic_shapes=axes,
            input_names=input_names,
            output_names=output_names,
            dynamo=True,
            optimize=True,
            verbose=False,
        )
    assert program is not None
    program.save(path)
