"""``--dry-run``: what an export would make, how large and how fast, from the config and the weights' headers alone.

The model is built on PyTorch's meta device, which has shapes but no numbers, so this takes seconds and no memory for
models of any size. Speed is a bound: a decode step reads every weight once, and this machine's memory delivers only so
many bytes per second, which is measured here.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PretrainedConfig

from exporters import seq2seq
from exporters.attention import LayerShape
from exporters.checkpoint import Checkpoint, open_checkpoint
from exporters.config import DEFAULT_MAX_MODEL_LEN, ExportConfig
from exporters.decoder import MAX_TOP_LOGITS, DecoderShape, measure
from exporters.encoder import is_encoder
from exporters.errors import ExportError, InvalidCheckpoint, InvalidConfig, reason_of
from exporters.generation_config import ignored_settings, load_generation_config
from exporters.original import SAFE_LOADING, kind_of, load_config, load_seq2seq_config, read_config
from exporters.version import check_output, version_config

FLOAT_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
MEASURED_BYTES = 192 << 20
"""Larger than the caches of any processor, and read in a fraction of a second."""
BASE_RSS_BYTES = 500 << 20
"""Of an export that has imported everything and loaded nothing."""
EXPORT_COPIES = 1.6
"""Peak memory of an export in fp32 sizes of the model: the model itself, and what is being written of it."""
QUANTIZED_ROOM = 0.5
"""How much more an export to integers needs, in the same unit."""


@dataclass(frozen=True)
class Plan:
    """What would be made. Sizes in bytes; ``decode_step_s`` is a lower bound for one row, from ``bandwidth``.

    ``num_parameters`` counts a tied weight once. Adapters add ``lora_bytes`` of memory for all slots.
    ``ignored_settings`` are what the checkpoint asks of ``generate`` that the engine does not do by itself.
    """

    checkpoint: str
    name: str
    architecture: str
    model_type: str
    kind: str
    num_layers: int
    num_parameters: int
    precision: str
    device: str
    max_model_len: int
    max_num_seqs: int
    max_source_len: int
    checkpoint_bytes: int
    folder_bytes: int
    cache_bytes_per_row: int
    cache_bytes: int
    lora_bytes: int
    export_peak_bytes: int
    serving_bytes: int
    bytes_per_decode_step: int
    bandwidth_bytes_per_s: float
    decode_step_s: float
    ignored_settings: Mapping[str, Any]


def plan(config: ExportConfig) -> Plan:
    """Raises ExportError for everything that the export itself would refuse before it loads weights."""
    check_output(config.out.absolute(), config.overwrite)
    checkpoint = open_checkpoint(config.checkpoint, with_weights=False)
    model_config = read_config(checkpoint)
    kind = "encoder" if is_encoder(checkpoint) else kind_of(model_config)
    if kind != "encoder":
        model_config = {"decoder": load_config, "encoder_decoder": load_seq2seq_config}[kind](checkpoint)
    model = _meta_model(checkpoint, model_config, kind)
    matrices = dict(_products(model))
    weights = {id(parameter): parameter for parameter in model.parameters()}
    num_parameters = sum(parameter.numel() for parameter in weights.values())
    in_products = {id(weight) for weight in matrices.values()}
    item_bytes = FLOAT_BYTES.get(config.precision, 4)
    other_bytes = item_bytes * sum(weight.numel() for key, weight in weights.items() if key not in in_products)
    product_bytes = sum(_product_bytes(config, weight) for key, weight in weights.items() if key in in_products)
    layers = _layers(model, kind)
    max_model_len, max_source_len = _lengths(config, checkpoint, model, kind, layers)
    rows = config.max_num_seqs + 1  # one is the health probe's
    per_token = sum(2 * layer.num_kv_heads * layer.head_size * item_bytes for layer in layers)
    per_row = 0 if kind == "encoder" else per_token * (max_model_len + max_source_len)
    lora_bytes = _lora_bytes(config, model)
    bandwidth = measure_bandwidth()
    encoder = model.get_encoder() if kind == "encoder_decoder" else torch.nn.Module()
    once = {id(parameter) for parameter in encoder.parameters()}  # per request, not per step
    step_bytes = sum(
        _product_bytes(config, weight) for key, weight in weights.items() if key in in_products and key not in once
    )
    checkpoint_bytes = sum(path.stat().st_size for path in checkpoint.files)
    copies = EXPORT_COPIES + (QUANTIZED_ROOM if config.precision != "fp32" else 0)
    return Plan(
        checkpoint=checkpoint.source,
        name=config.name or checkpoint.source.rstrip("/").split("/")[-1],
        architecture=str((model_config.architectures or [checkpoint.model_type])[0]),
        model_type=checkpoint.model_type,
        kind=kind,
        num_layers=len(layers),
        num_parameters=num_parameters,
        precision=config.precision,
        device=config.device,
        max_model_len=max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_source_len=max_source_len,
        checkpoint_bytes=checkpoint_bytes,
        folder_bytes=product_bytes + other_bytes,
        cache_bytes_per_row=per_row,
        cache_bytes=per_row * rows,
        lora_bytes=lora_bytes,
        export_peak_bytes=BASE_RSS_BYTES + int(copies * 4 * num_parameters),
        serving_bytes=product_bytes + other_bytes + per_row * rows + lora_bytes,
        bytes_per_decode_step=step_bytes,
        bandwidth_bytes_per_s=bandwidth,
        decode_step_s=step_bytes / bandwidth,
        ignored_settings={} if kind == "encoder" else ignored_settings(model.generation_config),
    )


def _meta_model(checkpoint: Checkpoint, config: PretrainedConfig, kind: str) -> Any:
    loader: Any = {"decoder": AutoModelForCausalLM, "encoder_decoder": AutoModelForSeq2SeqLM, "encoder": AutoModel}[
        kind
    ]
    try:
        with torch.device("meta"):
            model = loader.from_config(config, trust_remote_code=SAFE_LOADING["trust_remote_code"])
        model.tie_weights()
    except Exception as error:  # whatever a bad value of config.json leads to
        raise InvalidCheckpoint(f"transformers cannot make {checkpoint.folder}: {reason_of(error)}") from error
    if kind != "encoder":
        model.generation_config = load_generation_config(checkpoint)
    parameters = dict(model.named_parameters())
    for name, (shape, path) in checkpoint.tensor_shapes().items():
        expected = parameters.get(name)
        if expected is not None and tuple(expected.shape) != shape:
            raise InvalidCheckpoint(
                f"weight {name} has shape {list(shape)} in {path}; config.json expects {list(expected.shape)}: use the "
                "config.json that belongs to these weights"
            )
    return model


def _products(model: Any) -> Iterator[tuple[str, Any]]:
    """The matrices that a decode step multiplies with: all but norms, biases and tables that are only looked up."""
    head = model.get_output_embeddings()
    tables = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    for name, parameter in model.named_parameters():
        is_head = head is not None and parameter is head.weight
        if parameter.dim() >= 2 and (is_head or id(parameter) not in tables):
            yield name, parameter


def _product_bytes(config: ExportConfig, weight: Any) -> int:
    """A matrix as it is kept: int8 has a scale per output feature, int4 one per block."""
    count = weight.numel()
    if config.precision == "int8":
        return int(count + 4 * count // weight.shape[-1])
    if config.precision == "int4":
        return int(count // 2 + 4 * count // config.block_size)
    return int(count * FLOAT_BYTES[config.precision])


def _layers(model: Any, kind: str) -> list[LayerShape]:
    """Shapes of the layers' caches: measured as an export does, or else as the config states them."""
    if kind != "encoder":
        try:
            with torch.device("meta"):
                return list((measure(model) if kind == "decoder" else seq2seq.measure(model)).layers)
        except ExportError as error:
            if error.__cause__ is None:
                raise
        except Exception:  # some models look at numbers, and there are none here
            pass
    config: Any = model.config.get_text_config() if kind == "decoder" else model.config

    def stated(*names: str) -> int:
        return int(next((value for name in names if (value := getattr(config, name, None))), 0))

    num_layers = stated("num_decoder_layers", "decoder_layers", "num_hidden_layers")
    num_heads = stated("decoder_attention_heads", "num_attention_heads", "num_heads") or 1
    size = stated("head_dim", "d_kv") or config.hidden_size // num_heads
    return [LayerShape(num_heads, stated("num_key_value_heads") or num_heads, size, None)] * num_layers


def _lengths(
    config: ExportConfig, checkpoint: Checkpoint, model: Any, kind: str, layers: list[LayerShape]
) -> tuple[int, int]:
    """(max_model_len, max_source_len); raises InvalidConfig if the model does not have what was asked."""
    if kind == "decoder":
        shape = DecoderShape(tuple(layers), int(model.config.get_text_config().vocab_size))
        settings = version_config(config, checkpoint, model, shape, min(MAX_TOP_LOGITS, shape.vocab_size))
        return settings.engine.max_model_len, 0
    positions = getattr(model.config, "max_position_embeddings", None) or DEFAULT_MAX_MODEL_LEN
    max_model_len = config.max_model_len or min(positions, DEFAULT_MAX_MODEL_LEN)
    return max_model_len, (config.max_source_len or min(positions, 1024)) if kind == "encoder_decoder" else 0


def _lora_bytes(config: ExportConfig, model: Any) -> int:
    if not config.lora_slots:
        return 0
    sizes = [
        sum(module.weight.shape)
        for name, module in model.named_modules()
        if name.rsplit(".", 1)[-1] in config.lora_targets and getattr(module, "weight", None) is not None
    ]
    if not sizes:
        raise InvalidConfig(
            f"lora_targets has value {','.join(config.lora_targets)}; this model has no module of these names"
        )
    return 4 * (config.lora_slots + 1) * config.lora_rank * sum(sizes)


def measure_bandwidth() -> float:
    """Bytes per second that all cores together read from memory; the best of three rounds."""
    num_threads = psutil.cpu_count(logical=False) or 1
    parts = np.array_split(np.ones(MEASURED_BYTES // 4, np.float32), num_threads)
    best_s = float("inf")
    with ThreadPoolExecutor(num_threads) as threads:
        for _ in range(3):
            started_s = time.perf_counter()
            list(threads.map(lambda part: np.dot(part, part), parts))
            best_s = min(best_s, time.perf_counter() - started_s)
    return MEASURED_BYTES / best_s
