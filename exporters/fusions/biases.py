"""Biases that the node which reads a projection can add itself.

MatMul ─ Add ─┐                                         MatMul ─┐
MatMul ─ Add ─┤ MultiHeadAttention                 →    MatMul ─┤ MultiHeadAttention(bias)
MatMul ─ Add ─┘                                         MatMul ─┘
MatMul ─ Add ─ Gelu                                →    MatMul ─ BiasGelu
MatMul ─ Add ─ SkipLayerNormalization              →    MatMul ─ SkipLayerNormalization(bias)
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from exporters.fusions.rewriting import attribute, constant, initializer, insert_before, module_of, producer, replace

QKV_BIAS, SKIP_BIAS = 3, 4
"""Inputs of MultiHeadAttention and SkipLayerNormalization."""


def fuse_biases(graph: ir.Graph) -> None:
    for node in list(graph):
        if node.op_type == "MultiHeadAttention":
            _into_attention(graph, node)
        elif node.op_type == "SkipLayerNormalization":
            _into_skip(node)
        elif node.op_type == "Gelu" and attribute(node, "approximate", "none") == "none":
            _into_gelu(node)


def _into_attention(graph: ir.Graph, node: ir.Node) -> None:
    parts = [_split(value) for value in node.inputs[:3]]
    if node.inputs[QKV_BIAS] is not None or not any(parts):
        return
    biases = []
    for value, part in zip(node.inputs[:3], parts, strict=True):
        if value is None or value.shape is None or not isinstance(value.shape[-1], int):
            return
        array = constant(part[1]) if part else None
        biases.append(np.zeros(value.shape[-1], np.float32) if array is None else array)
    for index, part in enumerate(parts):
        if part:
            node.replace_input_with(index, part[0])
    name = f"{module_of(node)}.qkv_proj.bias"
    node.replace_input_with(QKV_BIAS, initializer(graph, name, np.concatenate(biases)))


def _into_skip(node: ir.Node) -> None:
    if len(node.inputs) > SKIP_BIAS and node.inputs[SKIP_BIAS] is not None:
        return
    for index in (0, 1):
        part = _split(node.inputs[index])
        if part:
            node.resize_inputs(SKIP_BIAS + 1)
            node.replace_input_with(index, part[0])
            node.replace_input_with(SKIP_BIAS, part[1])
            return


def _into_gelu(node: ir.Node) -> None:
    part, result = _split(node.inputs[0]), node.outputs[0]
    if part is None or result.is_graph_output():
        return
    replace(result, insert_before(node, "BiasGelu", part, like=result, domain="com.microsoft"))


def _split(value: ir.Value | None) -> tuple[ir.Value, ir.Value] | None:
    """(product, bias) if ``value`` is the sum of a MatMul and a vector, and nothing else reads it."""
    node = producer(value, "Add")
    if node is None or value is None or value.is_graph_output() or len(list(value.uses())) != 1:
        return None
    for product, bias in (tuple(node.inputs), tuple(node.inputs[::-1])):
        array = constant(bias)
        if producer(product, "MatMul") is not None and array is not None and array.ndim == 1:
            assert product is not None and bias is not None
            return product, bias
    return None
