"""fp16 and bf16: weights, activations and cache in 16 bits, and fp32 where that many bits are not enough.

In 16 bits: everything that descends from the embeddings or the cache: products, attention, norms (whose operators sum
in fp32 inside). In fp32:

    logits       everything after the last product, so soft caps, scales, logits and top_logits
    positions    what is computed from integers only: angles, masks, distances
    statistics   powers, sums, exponentials and roots outside the norms' operators

Casts are put where the two meet. Inputs keep their types, except the cache's; outputs likewise.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from exporters.quantization.products import Constants, behind_last_products, drop

TYPES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
SUFFIXES = {ir.DataType.FLOAT: "fp32", ir.DataType.FLOAT16: "fp16", ir.DataType.BFLOAT16: "bf16"}
MAX_FP16 = float(np.finfo(np.float16).max)

CACHE = ("past_key_values.", "present.", "cross.")
"""Beginnings of the names of inputs and outputs that have the cache's type."""
STATISTICS = {
    *("Pow", "Sqrt", "Reciprocal", "Exp", "Log", "Softplus", "Softmax", "LogSoftmax", "Erf", "Sin", "Cos"),
    *("ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL1", "ReduceL2", "ReduceLogSumExp", "CumSum"),
}
SOURCES = {"Cast", "Range", "ConstantOfShape", "Constant", "RandomNormal", "EyeLike"}
"""Make numbers out of none, or out of integers."""


def to_16_bits(model: ir.Model, dtype: ir.DataType) -> None:
    """Rewrite ``model``, whose floats are float32, in place."""
    Rewrite(model.graph, dtype).run()


class Rewrite:
    """One rewrite of one graph to ``dtype``."""

    def __init__(self, graph: ir.Graph, dtype: ir.DataType) -> None:
        self._graph = graph
        self._dtype = dtype
        self._constants = Constants(graph)
        self._casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self._at_the_end, _ = behind_last_products(graph)

    def run(self) -> None:
        outputs = [(index, output.dtype) for index, output in enumerate(self._graph.outputs)]
        for value in self._graph.inputs:
            if value.dtype == ir.DataType.FLOAT and (value.name or "").startswith(CACHE):
                value.type = ir.TensorType(self._dtype)
        for node in list(self._graph):
            self._set(node)
        for index, dtype in outputs:
            output = self._graph.outputs[index]
            wanted = self._dtype if (output.name or "").startswith(CACHE) else dtype
            if dtype == ir.DataType.FLOAT and output.dtype != wanted:
                self._cast_output(index, wanted or ir.DataType.FLOAT)

    def _set(self, node: ir.Node) -> None:
        """Choose the type in which ``node`` computes and give it inputs of that type."""
        if node.op_type in SOURCES:
            return  # says itself what it makes
        dtype = self._type_of(node)
        for index, value in enumerate(node.inputs):
            if value is not None and _is_float(value) and value.dtype != dtype:
                node.replace_input_with(index, self._as(value, dtype))
                drop(self._graph, value)
        for output in node.outputs:
            if output.dtype == ir.DataType.FLOAT:
                output.type = ir.TensorType(dtype)

    def _type_of(self, node: ir.Node) -> ir.DataType:
        if node in self._at_the_end or node.op_type in STATISTICS:
            return ir.DataType.FLOAT
        computed = [
            value for value in node.inputs if value is not None and _is_float(value) and not _is_constant(value)
        ]
        if computed and all(value.dtype == ir.DataType.FLOAT for value in computed):
            return ir.DataType.FLOAT
        return self._dtype

    def _as(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        if (value, dtype) not in self._casts:
            made = self._convert(value, dtype) if _is_constant(value) else self._insert_cast(value, dtype)
            self._casts[value, dtype] = made
        return self._casts[value, dtype]

    def _convert(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        assert value.const_value is not None
        array = value.const_value.numpy()
        if dtype == ir.DataType.FLOAT16:  # masks hold the lowest float
            array = np.clip(array, -MAX_FP16, MAX_FP16)
        return self._constants.instead_of(value, SUFFIXES[dtype], array.astype(dtype.numpy()))

    def _insert_cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        output = ir.Value(shape=value.shape, type=ir.TensorType(dtype))
        cast = ir.node("Cast", [value], {"to": dtype}, outputs=[output])
        maker = value.producer()
        if maker is None:
            self._graph.insert_before(self._graph[0], cast)
        else:
            cast.metadata_props.update(maker.metadata_props)
            maker.append(cast)
        return output

    def _cast_output(self, index: int, dtype: ir.DataType) -> None:
        value = self._graph.outputs[index]
        cast = self._insert_cast(value, dtype)
        cast.name, value.name = value.name, f"{value.name}_{value.dtype.name.lower() if value.dtype else ''}"
        self._graph.outputs[index] = cast


def _is_float(value: ir.Value) -> bool:
    return value.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def _is_constant(value: ir.Value) -> bool:
    return value.is_initializer() and value.const_value is not None
