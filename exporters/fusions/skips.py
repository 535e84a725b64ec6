"""The residual sum and the norm that reads it, as one node that returns both."""

from __future__ import annotations

import onnx_ir as ir

from exporters.fusions.rewriting import attribute, dims, insert_before, module_of, producer, replace

NORMS = {
    "SimplifiedLayerNormalization": "SkipSimplifiedLayerNormalization",
    "LayerNormalization": "SkipLayerNormalization",
}


def fuse_skips(graph: ir.Graph) -> None:
    for norm in [node for node in graph if node.op_type in NORMS]:
        add = producer(norm.inputs[0], "Add")
        if add is None or norm.outputs[0].is_graph_output() or add.outputs[0].is_graph_output():
            continue
        left, right = add.inputs
        if left is None or right is None or dims(left) is None or len(dims(left) or ()) != 3:
            continue
        if dims(left) != dims(right) or attribute(norm, "axis", -1) != -1:
            continue
        total, result = add.outputs[0], norm.outputs[0]
        normed = insert_before(
            norm,
            NORMS[norm.op_type],
            [left, right, *norm.inputs[1:]],
            {"epsilon": attribute(norm, "epsilon", 1e-5)},
            like=result,
            domain="com.microsoft",
            module=module_of(norm),
        )
        node = normed.producer()
        assert node is not None
        node.resize_outputs(4)  # normed, mean, inverse deviation, sum
        for unused in node.outputs[1:3]:
            unused.name = ""
        summed = node.outputs[3]
        summed.name, summed.shape, summed.type = f"{total.name}_summed", total.shape, total.type
        replace(result, normed)
        replace(total, summed)
