"""Products of 8-bit weights and 8-bit activations: int8 on the CPU.

    x ─ Abs ─ ReduceMax ─ m (…, 1) ───────────┐
    └─ Div by m ─ QuantizeLinear ─ q ─ MatMulIntegerToFloat ─ …
                                       Wq, scales / 127 ┘

Weights have one scale per output channel, ``max|W[:, n]| / 127``; activations one per row, ``m / 127`` with
``m = max|x_row|``, found at run time, so that a row's result does not depend on other rows. Sums of q · Wq are int32,
so exact in any order. Both are symmetric; the operator asks for unsigned activations, hence the zero point 128. A row
of zeros is divided by zero, and what comes of that is multiplied by m = 0 in the end, so it needs no node of its own.
Products that read the same x share q and m.

Four nodes a value and one a product, as few as there are: DynamicQuantizeLinear, DynamicQuantizeMatMul and
QLinearMatMul know only one scale for all rows, and QuantizeLinear with a scale per row (blocks) wants a zero point per
row too. MatMulIntegerToFloat takes scales of shape (…, 1) for q; its description speaks of a scalar, but ONNX
Runtime's optimizer makes such nodes itself, out of MatMulInteger ─ Cast ─ Mul. A bias stays an Add behind the node: the
node (1.31) would multiply it by m, and so do those nodes once the optimizer has turned them and their Add into one.

On x86 CPUs without VNNI, products of unsigned with signed bytes overflow in the kernel unless the session is opened
with ``session.x64quantprecision`` = 1; where there is VNNI that setting only costs (prefill took 1.7 times as long).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from exporters.quantization.products import Constants, Product, by_input, hand_over, insert, matrix, with_last

MAX_INT8 = 127
ZERO_POINT = 128
ROWS_PER_BLOCK = 4096
"""A vocabulary's matrix is rounded a part at a time, so that no second float copy of it exists."""


class Int8Matrices:
    """The 8-bit forms of one graph's matrices, made when first asked for and then shared: by tied heads and tables."""

    def __init__(self, constants: Constants) -> None:
        self._constants = constants
        self._made: dict[ir.Value, tuple[ir.Value, np.ndarray]] = {}

    def of(self, weight: ir.Value, *, is_transposed: bool) -> tuple[ir.Value, np.ndarray]:
        """(matrix in int8 in the layout of ``weight``, float32 scales (N)): N is its first axis if transposed."""
        if weight not in self._made:
            array, scales = quantize_matrix(matrix(weight), axis=1 if is_transposed else 0)
            self._made[weight] = (self._constants.instead_of(weight, "int8", array), scales)
        return self._made[weight]


def quantize_products(graph: ir.Graph, products: list[Product], matrices: Int8Matrices, constants: Constants) -> None:
    """Rewrite ``products``; the matrices that they read are dropped once nothing else reads them."""
    step = constants.shared("int8.step", np.array(1 / MAX_INT8, np.float32))
    zero_point = constants.shared("int8.zero_point", np.array(ZERO_POINT, np.uint8))
    last = constants.shared("axis.last", np.array([-1], np.int64))
    for group in by_input(products):
        place, value = group[0].node, group[0].input
        shape = value.shape
        row = with_last(shape, 1)
        magnitude = insert(place, "Abs", [value], dtype=ir.DataType.FLOAT, shape=shape)
        maximum = insert(place, "ReduceMax", [magnitude, last], {"keepdims": 1}, dtype=ir.DataType.FLOAT, shape=row)
        unit = insert(place, "Div", [value, maximum], dtype=ir.DataType.FLOAT, shape=shape)
        rounded = insert(place, "QuantizeLinear", [unit, step, zero_point], dtype=ir.DataType.UINT8, shape=shape)
        for product in group:
            node, result = product.node, product.node.outputs[0]
            weight, scale = matrices.of(product.weight, is_transposed=product.is_transposed)
            scales = constants.instead_of(product.weight, "scales", scale / np.float32(MAX_INT8))
            if product.is_transposed:  # turned by ONNX Runtime when it loads the graph; stored once
                turned = ir.Shape(reversed(weight.shape or ()))
                weight = insert(node, "Transpose", [weight], {"perm": [1, 0]}, dtype=ir.DataType.INT8, shape=turned)
            hand_over(
                graph,
                result,
                insert(
                    node,
                    "MatMulIntegerToFloat",
                    [rounded, weight, maximum, scales, zero_point],
                    dtype=ir.DataType.FLOAT,
                    shape=result.shape,
                    domain="com.microsoft",
                ),
            )


def quantize_table(graph: ir.Graph, gather: ir.Node, matrices: Int8Matrices, constants: Constants) -> None:
    """Look tokens up in 8-bit rows, each with its scale; a tied head multiplies with the same rows."""
    table, ids = gather.inputs
    assert table is not None
    result = gather.outputs[0]
    rows, scales = matrices.of(table, is_transposed=True)
    column = constants.instead_of(table, "row_scales", scales[:, None])
    found = insert(gather, "Gather", [rows, ids], {"axis": 0}, dtype=ir.DataType.INT8, shape=result.shape)
    scale = insert(
        gather, "Gather", [column, ids], {"axis": 0}, dtype=ir.DataType.FLOAT, shape=with_last(result.shape, 1)
    )
    numbers = insert(gather, "Cast", [found], {"to": ir.DataType.FLOAT}, dtype=ir.DataType.FLOAT, shape=result.shape)
    hand_over(graph, result, insert(gather, "Mul", [numbers, scale], dtype=ir.DataType.FLOAT, shape=result.shape))


def quantize_matrix(array: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """(int8 of the same shape, float32 scales): symmetric, one scale for what lies along ``axis`` of a matrix."""
    scales = np.maximum(array.max(axis=axis), -array.min(axis=axis)) / np.float32(MAX_INT8)
    scales[scales == 0] = 1
    rounded = np.empty(array.shape, np.int8)
    pick: Callable[[int], np.ndarray] = (
        (lambda start: scales[start : start + ROWS_PER_BLOCK, None]) if axis == 1 else (lambda start: scales)
    )
    for start in range(0, len(array), ROWS_PER_BLOCK):
        part = array[start : start + ROWS_PER_BLOCK] / pick(start)
        rounded[start : start + ROWS_PER_BLOCK] = np.rint(part, out=part)
    return rounded, scales
