"""Weights of 4 or 8 bits with a scale per block of features: MatMulNBits, and tables by GatherBlockQuantized.

    W (K, N)  →  packed uint8 (N, blocks, block_size · bits / 8), scales (N, blocks);  blocks = ⌈K / block_size⌉

Weights are symmetric around 8 or 128. ONNX Runtime's own routine packs them. Activations stay floating; on the CPU,
``accuracy_level`` 4 multiplies in int8 with a scale per row and block, 0 in float. Of the CPU's kernels, those with
level 4 and blocks of 16 or 32 (8 bits: up to 64) give a row the same bits whatever rows are beside it; level 0 and
larger blocks do not (checked with ONNX Runtime 1.31 on AVX-512 with VNNI).

Operators: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnxruntime.capi import _pybind_state as library

from exporters.quantization.products import Constants, Product, drop, hand_over, insert, matrix

COLUMNS_PER_BLOCK = 4096
"""A vocabulary's matrix is packed a part at a time, so that no second float copy of it exists."""
PACK = {4: library.quantize_matmul_4bits, 8: library.quantize_matmul_8bits}


@dataclass(frozen=True)
class Packed:
    """A packed matrix (N, blocks, bytes) and its scales (N, blocks) as initializers."""

    values: ir.Value
    scales: ir.Value


class PackedMatrices:
    """The packed forms of one graph's matrices, made when first asked for and then shared."""

    def __init__(self, constants: Constants, block_size: int) -> None:
        self.block_size = block_size
        self._constants = constants
        self._made: dict[tuple[ir.Value, int], Packed] = {}

    def of(self, weight: ir.Value, bits: int, *, is_transposed: bool) -> Packed:
        if (weight, bits) not in self._made:
            array = matrix(weight)
            values, scales = pack_matrix(array.T if is_transposed else array, bits, self.block_size)
            self._made[weight, bits] = Packed(
                self._constants.instead_of(weight, f"{bits}bits", values),
                self._constants.instead_of(weight, "scales", scales),
            )
        return self._made[weight, bits]


def pack_products(
    graph: ir.Graph, products: list[Product], bits: int, accuracy_level: int, matrices: PackedMatrices
) -> None:
    """Rewrite ``products``; the matrices that they read are dropped once nothing else reads them."""
    for product in products:
        node, result = product.node, product.node.outputs[0]
        packed = matrices.of(product.weight, bits, is_transposed=product.is_transposed)
        shape = product.weight.shape
        assert shape is not None
        num_in, num_out = (int(size) for size in (shape[::-1] if product.is_transposed else shape))  # type: ignore
        attributes = {
            "K": num_in,
            "N": num_out,
            "bits": bits,
            "block_size": matrices.block_size,
            "accuracy_level": accuracy_level,
        }
        inputs: list[ir.Value | None] = [product.input, packed.values, packed.scales]
        new = insert(
            node,
            "MatMulNBits",
            inputs,
            attributes,
            dtype=ir.DataType.FLOAT,
            shape=result.shape,
            domain="com.microsoft",
        )
        hand_over(graph, result, new)


def pack_table(graph: ir.Graph, gather: ir.Node, matrices: PackedMatrices, constants: Constants) -> bool:
    """Look tokens up in 8-bit rows; a tied head multiplies with the same. False if blocks do not fill the rows."""
    table, ids = gather.inputs
    assert table is not None and table.shape is not None
    num_rows, width = (int(size) for size in table.shape)  # type: ignore[arg-type]
    if width % matrices.block_size:
        return False
    packed = matrices.of(table, 8, is_transposed=True)
    flat = constants.shared(f"shape.{num_rows}x{width}", np.array([num_rows, width], np.int64))
    rows = insert(gather, "Reshape", [packed.values, flat], dtype=ir.DataType.UINT8, shape=ir.Shape([num_rows, width]))
    attributes = {"gather_axis": 0, "quantize_axis": 1, "block_size": matrices.block_size, "bits": 8}
    new = insert(
        gather,
        "GatherBlockQuantized",
        [rows, ids, packed.scales],
        attributes,
        dtype=ir.DataType.FLOAT,
        shape=gather.outputs[0].shape,
        domain="com.microsoft",
    )
    hand_over(graph, gather.outputs[0], new)
    drop(graph, table)
    return True


def pack_matrix(array: np.ndarray, bits: int, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 (N, blocks, block_size · bits / 8), float32 scales (N, blocks)) of a matrix (K, N)."""
    num_in, num_out = array.shape
    blocks = -(-num_in // block_size)
    values = np.zeros((num_out, blocks, block_size * bits // 8), np.uint8)
    scales = np.zeros((num_out, blocks), np.float32)
    unused_zero_points = np.zeros((COLUMNS_PER_BLOCK, (blocks * bits + 7) // 8), np.uint8)
    for start in range(0, num_out, COLUMNS_PER_BLOCK):
        part = np.zeros((blocks * block_size, min(COLUMNS_PER_BLOCK, num_out - start)), np.float32)
        part[:num_in] = array[:, start : start + COLUMNS_PER_BLOCK]
        end = start + part.shape[1]
        zero_points = unused_zero_points[: part.shape[1]]
        is_symmetric = True
        PACK[bits](
            values[start:end], part, scales[start:end], zero_points, block_size, end - start, num_in, is_symmetric
        )
    return values, scales
