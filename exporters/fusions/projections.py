"""Two rewrites that bring every projection into one form: a product, and perhaps a norm, on (B, S, ·).

Reshape (B·S, E) ─ Gemm ─ Reshape (B, S, N)   →   MatMul ─ Add       as written by GPT-2's Conv1D
Transpose ─ SimplifiedLayerNormalization      →   the same, swapped  a norm over features does not mind the others
"""

from __future__ import annotations

import onnx_ir as ir

from exporters.fusions.rewriting import (
    attribute,
    constant,
    dims,
    initializer,
    insert_before,
    module_of,
    only_user,
    producer,
    replace,
)


def unflatten_products(graph: ir.Graph) -> None:
    for gemm in [node for node in graph if node.op_type == "Gemm"]:
        flatten, unflatten = producer(gemm.inputs[0], "Reshape"), only_user(gemm.outputs[0])
        if flatten is None or unflatten is None or unflatten.op_type != "Reshape" or not _is_plain(gemm):
            continue
        value, result = flatten.inputs[0], unflatten.outputs[0]
        weight, bias = gemm.inputs[1], gemm.inputs[2] if len(gemm.inputs) > 2 else None
        matrix = constant(weight)
        if value is None or weight is None or matrix is None or result.is_graph_output():
            continue
        if attribute(gemm, "transB", 0):
            matrix = matrix.T
        before, after = dims(value), dims(result)
        if before is None or after is None or after != (*before[:-1], matrix.shape[1]) or before[-1] != len(matrix):
            continue
        if attribute(gemm, "transB", 0):
            weight = initializer(graph, f"{weight.name}_transposed", matrix)
        module = module_of(gemm)
        product = insert_before(gemm, "MatMul", [value, weight], like=result, module=module)
        if bias is not None:
            product = insert_before(gemm, "Add", [product, bias], like=result, module=module)
        replace(result, product)


def _is_plain(gemm: ir.Node) -> bool:
    return (
        attribute(gemm, "alpha", 1.0) == 1.0
        and (len(gemm.inputs) < 3 or attribute(gemm, "beta", 1.0) == 1.0)
        and not attribute(gemm, "transA", 0)
    )


def untranspose_norms(graph: ir.Graph) -> None:
    for norm in [node for node in graph if node.op_type == "SimplifiedLayerNormalization"]:
        transpose = producer(norm.inputs[0], "Transpose")
        if transpose is None or transpose.inputs[0] is None or norm.outputs[0].is_graph_output():
            continue
        order = list(attribute(transpose, "perm", ()))
        if not order or order[-1] != len(order) - 1 or attribute(norm, "axis", -1) != -1:
            continue
        value, result = transpose.inputs[0], norm.outputs[0]
        attributes = {"axis": -1, "epsilon": attribute(norm, "epsilon", 1e-5)}
        module = module_of(norm)
        normed = insert_before(norm, norm.op_type, [value, norm.inputs[1]], attributes, like=value, module=module)
        replace(result, insert_before(norm, "Transpose", [normed], {"perm": order}, like=result, module=module))
