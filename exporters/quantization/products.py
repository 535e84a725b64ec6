"""What of a graph can be quantized: products with constant matrices, and tables that tokens are looked up in.

    x ─ MatMul ─ …                  a product; its weight is kept as (K, N), ready to multiply
         W

    ids ─ Gather ─ …                a table, (V, E)
            T
    x ─ MatMul ─ …                  a product whose weight is kept as (N, K); here it is the table too, a tied head
         └ Transpose ─ T

K features come in, N go out. Whether anything else reads a matrix, and in which layout it is kept, is all that the
quantizers need to know about where it came from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from exporters.fusions.rewriting import attribute, constant, initializer, insert_before, producer, replace
from exporters.graph import weight_name

TOKEN_IDS = "input_ids"
LOGITS = ("logits", "top_logits")
MOVES = {"Cast", "Reshape", "Squeeze", "Unsqueeze", "Identity", "Flatten"}
PRODUCTS = {"MatMul", "Gemm", "MatMulNBits"}


@dataclass(frozen=True)
class Product:
    """``node`` multiplies ``input`` (…, K) with ``weight``: (K, N), or (N, K) if ``is_transposed``."""

    node: ir.Node
    weight: ir.Value
    is_transposed: bool

    @property
    def input(self) -> ir.Value:
        """What the node reads now: another value than before once what made that has been rewritten."""
        value = self.node.inputs[0]
        assert value is not None
        return value


def split_gemms(graph: ir.Graph) -> None:
    """Every plain Gemm with a constant matrix as MatMul and Add, so that there is one form of product."""
    for node in [node for node in graph if node.op_type == "Gemm"]:
        value, weight = node.inputs[:2]
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        factors = [attribute(node, name, 1.0) for name in ("alpha", "beta")]
        if value is None or weight is None or not is_matrix(weight) or value.is_initializer():
            continue
        if factors != [1.0, 1.0] or attribute(node, "transA", 0):
            continue
        result = node.outputs[0]
        if attribute(node, "transB", 0):
            turned = ir.Shape(reversed(weight.shape or ()))
            weight = insert(node, "Transpose", [weight], {"perm": [1, 0]}, dtype=ir.DataType.FLOAT, shape=turned)
        product = insert(node, "MatMul", [value, weight], dtype=ir.DataType.FLOAT, shape=result.shape)
        if bias is not None:
            product = insert(node, "Add", [product, bias], dtype=ir.DataType.FLOAT, shape=result.shape)
        hand_over(graph, result, product)


def find_products(graph: ir.Graph) -> list[Product]:
    """Every MatMul of something computed with a constant float matrix, in the graph's order."""
    found = []
    for node in graph:
        if node.op_type != "MatMul" or node.domain not in ("", "ai.onnx"):
            continue
        value, weight = node.inputs
        if value is None or weight is None or value.is_initializer():
            continue
        transpose = producer(weight, "Transpose")
        kept = weight if transpose is None else transpose.inputs[0]
        if kept is None or not is_matrix(kept):
            continue
        if transpose is not None and list(attribute(transpose, "perm", (1, 0))) != [1, 0]:
            continue
        found.append(Product(node, kept, transpose is not None))
    return found


def find_tables(graph: ir.Graph) -> list[ir.Node]:
    """Every Gather that looks tokens up in a constant float matrix.

    Tables read by anything else, such as positions, are small and often hold values of very different sizes.
    """
    return [
        node
        for node in graph
        if node.op_type == "Gather"
        and attribute(node, "axis", 0) == 0
        and node.inputs[0] is not None
        and is_matrix(node.inputs[0])
        and _are_token_ids(node.inputs[1])
    ]


def behind_last_products(graph: ir.Graph) -> tuple[set[ir.Node], set[ir.Node]]:
    """(what is computed between the last products and the logits, those products); empty if there are no logits."""
    between: set[ir.Node] = set()
    heads: set[ir.Node] = set()
    values = [output for output in graph.outputs if output.name in LOGITS]
    while values:
        node = values.pop().producer()
        if node is None or node in between:
            continue
        if node.op_type in PRODUCTS:
            heads.add(node)
            continue
        between.add(node)
        values += [value for value in node.inputs if value is not None]
    return between, heads


def is_matrix(value: ir.Value) -> bool:
    return (
        value.is_initializer()
        and value.const_value is not None
        and value.const_value.dtype == ir.DataType.FLOAT
        and len(value.const_value.shape) == 2
    )


def _are_token_ids(value: ir.Value | None) -> bool:
    while value is not None:
        node = value.producer()
        if node is None:
            return value.is_graph_input() and value.name == TOKEN_IDS
        value = node.inputs[0] if node.op_type in MOVES else None
    return False


def by_input(products: list[Product]) -> list[list[Product]]:
    """Products that read the same value, in the order of their first."""
    groups: dict[ir.Value, list[Product]] = {}
    for product in products:
        groups.setdefault(product.input, []).append(product)
    return list(groups.values())


def matrix(value: ir.Value) -> np.ndarray:
    array = constant(value)
    assert array is not None
    return array


def insert(
    place: ir.Node,
    op_type: str,
    inputs: list[ir.Value | None],
    attributes: Mapping[str, object] | None = None,
    *,
    dtype: ir.DataType,
    shape: ir.Shape | None,
    domain: str = "",
) -> ir.Value:
    """Add a node before ``place``, said to come from the same module; its output is of ``dtype``."""
    output = insert_before(place, op_type, inputs, attributes, like=place.outputs[0], shape=shape, domain=domain)
    output.type = ir.TensorType(dtype)
    output.shape = shape
    return output


def with_last(shape: ir.Shape | None, *last: int) -> ir.Shape | None:
    """``shape`` with other sizes in place of its last."""
    return None if shape is None else ir.Shape([*shape[:-1], *last])


class Constants:
    """Adds constants to one graph: shared ones under a name of their own, others named after what they replace."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph

    def shared(self, name: str, array: np.ndarray) -> ir.Value:
        return self.graph.initializers.get(name) or initializer(self.graph, name, array)

    def instead_of(self, weight: ir.Value, suffix: str, array: np.ndarray) -> ir.Value:
        return initializer(self.graph, f"{weight_name(weight)}_{suffix}", array)


def hand_over(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    """Have everything read ``new`` instead of ``old``, a graph output too, and drop what made ``old``."""
    if old.is_graph_output():
        name = old.name
        old.name = f"{name}_before"
        new.name = name
        for index, output in enumerate(graph.outputs):
            if output is old:
                graph.outputs[index] = new
    replace(old, new)
    drop(graph, old)


def drop(graph: ir.Graph, value: ir.Value | None) -> None:
    """Remove what made ``value`` as far as nothing reads it any more, so that a weight's memory is free at once."""
    if value is None or value.is_graph_output() or value.uses():
        return
    node = value.producer()
    if node is None:
        if value.is_initializer() and value.name is not None:
            del graph.initializers[value.name]
            value.const_value = None
        return
    if any(output.uses() or output.is_graph_output() for output in node.outputs):
        return
    inputs = list(node.inputs)
    graph.remove(node, safe=True)
    for source in dict.fromkeys(inputs):
        drop(graph, source)


def weight_bytes(graph: ir.Graph) -> int:
    return sum(value.const_value.nbytes for value in graph.initializers.values() if value.const_value is not None)
