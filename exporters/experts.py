"""Mixture of experts as plain products: what the model calls instead of its own experts while it is traced.

Transformers looks its experts' function up by name, as it does attention. Ours sorts the pairs of token and chosen
expert by expert, multiplies every expert's share of them with that expert's weights, and puts the results back:

    tokens (N, E) ─ sorted by expert ─ GroupedMatMul ─ gate ─ GroupedMatMul ─ back in order ─ Σ routing weight · result

``GroupedMatMul`` exists while tracing only; ``lower_grouped_products`` replaces it by a Split into one part an expert
(which may be empty), one MatMul each and a Concat. Later steps so find ordinary products with constant weights. Routing
is the model's own and traced as written.

Why this form: 8 experts of 512×1024, 2 chosen, one thread of a machine that was busy with other work, one run, ms for
1 / 8 / 32 / 512 tokens: products an expert 0.2 / 11 / 16 / 127; ``com.microsoft.MoE`` 0.6 / 13 / 23 / 143, and a
token's bits depend on how many others chose the same expert; all experts on all tokens 11 / 12 / 29 / 488; the chosen
experts' weights gathered by token 1.4 / 46 / 187 / –. The products were measured with one selection and one ScatterND
an expert; sorting once, as here, saves nodes but has not been timed itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from transformers.integrations.moe import ExpertsInterface

from exporters.fusions.rewriting import attribute, constant, insert_before, module_of, replace

NAME = "llmos_export"
"""Our name in transformers' experts interface."""
DOMAIN = "llmos"
GROUPED = "GroupedMatMul"


@contextmanager
def traceable_experts(model: torch.nn.Module) -> Iterator[None]:
    """While open, ``model`` computes its experts by grouped products."""
    ExpertsInterface.register(NAME, _experts)
    configs: dict[int, Any] = {
        id(module.config): module.config for module in model.modules() if hasattr(module, "_apply_gate")
    }
    before = {key: config._experts_implementation for key, config in configs.items()}
    try:
        for config in configs.values():
            config._experts_implementation_internal = NAME
        yield
    finally:
        for key, config in configs.items():
            config._experts_implementation_internal = before[key]
        ExpertsInterface._global_mapping.pop(NAME, None)


def _experts(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """hidden_states (N, E), the experts chosen by each token and their weights, both (N, K) → (N, E)."""
    num_tokens, top_k = top_k_index.shape
    expert_ids = top_k_index.reshape(-1)
    counts = (expert_ids.unsqueeze(-1) == torch.arange(module.num_experts)).to(torch.int64).sum(0)  # (experts,)
    num_pairs = counts.sum(0, keepdim=True)
    sorted_ids, order = _sorted(expert_ids, num_pairs)

    name = "gate_up_proj" if module.has_gate else "up_proj"
    result = _product(module, name, hidden_states[order // top_k], sorted_ids, counts)
    result = module._apply_gate(result) if module.has_gate else module.act_fn(result)
    result = _product(module, "down_proj", result, sorted_ids, counts)
    if module.has_post_expert_norm:
        result = module.post_expert_norm(result)
    _, place = _sorted(order, num_pairs)
    result = result[place].reshape(num_tokens, top_k, -1) * top_k_weights.unsqueeze(-1)
    return result.sum(1).to(hidden_states.dtype)


def _sorted(numbers: torch.Tensor, size: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(numbers in rising order, where each was), equal ones in their order, as TopK promises; ``size`` (1,)."""
    attributes: dict[str, Any] = {"axis": 0, "largest": 0, "sorted": 1}
    dtypes, shapes = (numbers.dtype, torch.int64), (numbers.shape, numbers.shape)
    return tuple(torch.onnx.ops.symbolic_multi_out("TopK", (numbers, size), attributes, dtypes=dtypes, shapes=shapes))


def _product(
    module: Any, name: str, rows: torch.Tensor, expert_ids: torch.Tensor, counts: torch.Tensor
) -> torch.Tensor:
    """rows (N·K, in), sorted by expert, ``counts`` of them each → (N·K, out)."""
    weight = getattr(module, name)  # (experts, in, out) or (experts, out, in)
    product = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{GROUPED}",
        (rows, weight, counts),
        {"transposed": int(not module.is_transposed)},
        dtype=rows.dtype,
        shape=(rows.shape[0], weight.shape[2] if module.is_transposed else weight.shape[1]),
        version=1,
    )
    return product + getattr(module, f"{name}_bias")[expert_ids] if module.has_bias else product


def lower_grouped_products(model: ir.Model) -> None:
    """Replace every GroupedMatMul of ``model`` by the products of its experts."""
    graph = model.graph
    for node in [node for node in graph if node.op_type == GROUPED and node.domain == DOMAIN]:
        rows, weight, counts = node.inputs
        assert rows is not None and weight is not None and weight.name is not None
        matrices = constant(weight)
        assert matrices is not None
        if attribute(node, "transposed", 0):
            matrices = np.swapaxes(matrices, 1, 2)
        result = node.outputs[0]
        parts = _split(node, rows, counts, len(matrices))
        width = ir.Shape([None, matrices.shape[2]])
        products = [
            insert_before(
                node,
                "MatMul",
                [part, _matrix(graph, f"{weight.name}.{expert}_transposed", matrix)],
                like=result,
                shape=width,
                module=f"{module_of(node)}.{expert}",
            )
            for expert, (part, matrix) in enumerate(zip(parts, matrices, strict=True))
        ]
        replace(result, insert_before(node, "Concat", products, {"axis": 0}, like=result))
        graph.remove(node, safe=True)
    model.opset_imports.pop(DOMAIN, None)


def _split(node: ir.Node, rows: ir.Value, counts: ir.Value | None, num_parts: int) -> list[ir.Value]:
    first = insert_before(node, "Split", [rows, counts], {"axis": 0}, like=rows)
    split = first.producer()
    assert split is not None
    split.resize_outputs(num_parts)
    for expert, part in enumerate(split.outputs):
        part.name = f"{rows.name}_of_expert_{expert}"
        part.type, part.shape = rows.type, ir.Shape([None, *(rows.shape or [None, None])[1:]])
    return list(split.outputs)


def _matrix(graph: ir.Graph, name: str, matrix: np.ndarray) -> ir.Value:
    """A view of the experts' weights: nothing is copied before the graph is written."""
    tensor = ir.Tensor(matrix, name=name)
    value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value
