"""Reshapes that are not needed, or need not ask for sizes at run time.

Splitting attention's output into heads and joining them again ends where it began. A reshape that keeps rows and tokens
can say so by a constant, which saves the nodes that would put its shape together.
"""

from __future__ import annotations

import onnx_ir as ir

from exporters.fusions.rewriting import dims, producer, replace, shape_constant


def remove_round_trips(graph: ir.Graph) -> None:
    """Let what reads a reshaped value read an earlier one of the same shape; the reshapes between are left unused."""
    for node in graph:
        if node.op_type != "Reshape" or node.outputs[0].is_graph_output():
            continue
        shape = dims(node.outputs[0])
        earlier = node.inputs[0]
        while earlier is not None and shape is not None:
            if dims(earlier) == shape:
                replace(node.outputs[0], earlier)
                break
            reshape = producer(earlier, "Reshape")
            earlier = reshape.inputs[0] if reshape is not None else None


def settle_shapes(graph: ir.Graph) -> None:
    """Give every reshape from (B, S, …) to (B, S, numbers …) a constant shape."""
    for node in graph:
        if node.op_type != "Reshape" or node.inputs[0] is None or node.inputs[1] is None:
            continue
        before, after = dims(node.inputs[0]), dims(node.outputs[0])
        if node.inputs[1].is_initializer() or before is None or after is None or len(before) < 2 or len(after) < 2:
            continue
        if before[:2] == after[:2] and all(isinstance(size, int) and size > 0 for size in after[2:]):
            node.replace_input_with(1, shape_constant(graph, (0, 0, *after[2:])))  # type: ignore[arg-type]
            node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)
