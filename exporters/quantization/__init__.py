"""Fewer bits: a fused float32 graph in one of the precisions, in place; its inputs and outputs stay what they were.

    precision  device  weights                    activations             cache
    fp32       cpu     32 bits                    fp32                    fp32
    fp16       both    16 bits                    fp16                    fp16
    bf16       cuda    16 bits                    bf16                    bf16
    int8       cpu     8 bits, scale per channel  8 bits, scale per row   fp32     (w8a8)
    int4       cpu     4 bits, scale per block    fp32, head as in int8   fp32     (nbits)
    int8       cuda    8 bits, scale per block    fp16                    fp16     (nbits)
    int4       cuda    4 bits, scale per block    fp16, head 8 bits       fp16     (nbits)

Which combinations exist is ``exporters.config.CACHE_TYPES``. Tables that tokens are looked up in are kept in 8 bits
wherever weights have 8 or 4, shared with a tied head. Only products with constant matrices are quantized: products
with stacks of matrices, such as experts, stay float. ``smoothing`` may go before int8 on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from exporters.config import CACHE_TYPES, ExportConfig
from exporters.errors import InvalidConfig
from exporters.quantization.floats import TYPES, to_16_bits
from exporters.quantization.nbits import PackedMatrices, pack_products, pack_table
from exporters.quantization.products import (
    Constants,
    Product,
    behind_last_products,
    find_products,
    find_tables,
    split_gemms,
    weight_bytes,
)
from exporters.quantization.smoothing import read_calibration, smooth
from exporters.quantization.w8a8 import Int8Matrices, quantize_products, quantize_table

__all__ = ["QuantizationReport", "cache_type", "quantize", "read_calibration"]


@dataclass(frozen=True)
class QuantizationReport:
    """What was done to one graph. ``num_quantized`` counts its products, ``num_tables`` the tables of tokens,
    ``num_smoothed`` the values from which scale was moved into weights."""

    precision: str
    num_quantized: int
    num_tables: int
    num_smoothed: int
    weight_bytes_before: int
    weight_bytes_after: int


def cache_type(precision: str, device: str) -> str:
    """Type of keys and values, ``fp32``, ``fp16`` or ``bf16``, of a graph in that precision."""
    return CACHE_TYPES[precision, device]


def quantize(
    model: ir.Model, config: ExportConfig, calibration: Sequence[np.ndarray] | None = None
) -> QuantizationReport:
    """Bring ``model`` into ``config.precision`` for ``config.device``.

    ``calibration``: token ids (S,) of some texts; with them, scale is moved from activations into weights before
    they are quantized to int8 for the CPU.
    """
    if calibration and (config.precision, config.device) != ("int8", "cpu"):
        raise InvalidConfig(
            f"calibration is given with precision {config.precision!r} for {config.device}; expected it with int8 for "
            "cpu only, where activations are quantized"
        )
    graph = model.graph
    before = weight_bytes(graph)
    num_products = num_tables = num_smoothed = 0
    constants = Constants(graph)
    is_integer = config.precision in ("int8", "int4")
    if is_integer:
        split_gemms(graph)
        if calibration:
            num_smoothed = smooth(model, calibration)
        products, tables = find_products(graph), find_tables(graph)
        num_products, num_tables = len(products), len(tables)
        if config.device == "cpu":
            _to_integers_on_cpu(graph, config, products, tables, constants)
        else:
            num_tables = _to_integers_on_cuda(graph, config, products, tables, constants)
        model.opset_imports.setdefault("com.microsoft", 1)
    floats = "fp16" if is_integer and config.device == "cuda" else config.precision
    if floats in TYPES:
        to_16_bits(model, TYPES[floats])
    RemoveUnusedNodesPass()(model)
    return QuantizationReport(config.precision, num_products, num_tables, num_smoothed, before, weight_bytes(graph))


def _to_integers_on_cpu(
    graph: ir.Graph, config: ExportConfig, products: list[Product], tables: list[ir.Node], constants: Constants
) -> None:
    matrices = Int8Matrices(constants)
    for table in tables:
        quantize_table(graph, table, matrices, constants)
    if config.precision == "int8":
        quantize_products(graph, products, matrices, constants)
        return
    heads, others = _split_heads(graph, products)
    pack_products(graph, others, 4, config.accuracy_level, PackedMatrices(constants, config.block_size))
    quantize_products(graph, heads, matrices, constants)


def _to_integers_on_cuda(
    graph: ir.Graph, config: ExportConfig, products: list[Product], tables: list[ir.Node], constants: Constants
) -> int:
    """Returns how many of the tables were packed."""
    matrices = PackedMatrices(constants, config.block_size)
    num_tables = sum(pack_table(graph, table, matrices, constants) for table in tables)
    heads, others = _split_heads(graph, products)
    pack_products(graph, others, 4 if config.precision == "int4" else 8, config.accuracy_level, matrices)
    pack_products(graph, heads, 8, config.accuracy_level, matrices)
    return num_tables


def _split_heads(graph: ir.Graph, products: list[Product]) -> tuple[list[Product], list[Product]]:
    """(products that end in the logits, all others). Nothing that follows a head evens its errors out."""
    _, heads = behind_last_products(graph)
    found = [product for product in products if product.node in heads]
    return found, [product for product in products if product.node not in heads]
