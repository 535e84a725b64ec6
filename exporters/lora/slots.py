"""Room for adapters in the fused graph: every product that adapters may change gets two matrices per slot as inputs.

A row that uses slot s ≥ 1 gets ``x·W + bias + (x·A[s])·B[s]``; slot 0, zeros, is none. Rows of one step may use
different slots; each is multiplied by its own two matrices, so a row's result does not depend on its neighbours'.
All of it for products that read the same x lies in one branch that is skipped when no row uses an adapter:

    adapter_ids (B) ─ max ─ any?
    x ─┬─ product ─ y ──────────────────────┐
       └─────────────────── If(any?) ───────┴─ then y + (x·A[ids])·B[ids] │ else y

    Gather(a, ids) (B, in, rank) ─ MatMul ─ MatMul(Gather(b, ids)) ─ Add        5 nodes a module

Low-rank adaptation: Hu et al., https://arxiv.org/abs/2106.09685. Weights packed side by side keep one pair of matrices
per module; the products of their pairs are put side by side, too.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from exporters.fusions.rewriting import SCOPES, initializer
from exporters.graph import WRAPPER_SCOPE
from exporters.lora.products import Part, Product, check_found, find_products, linear_modules
from triton_backend.config import LoraConfig, LoraTarget

ADAPTER_IDS = "adapter_ids"
ANY = "lora.any"


def add_lora_slots(
    model: ir.Model,
    targets: Sequence[str],
    num_slots: int,
    rank: int,
    torch_model: torch.nn.Module,
    *,
    is_skipped_when_unused: bool = True,
) -> LoraConfig:
    """Add slots for the modules of ``torch_model`` whose last name is in ``targets``; ``model`` is changed in place.

    ``is_skipped_when_unused`` False leaves out the branch, for graphs that must have no control flow (CUDA graphs).
    Raises InvalidConfig if a target is no linear layer of the model, UnsupportedArchitecture if the graph does not
    compute one of them as a product of its own.
    """
    graph = model.graph
    modules = linear_modules(torch_model, targets)
    products = find_products(graph, modules)
    check_found(modules, products, torch_model)

    adapter_ids = _input(graph, ADAPTER_IDS, ir.DataType.INT64, ["batch"])
    is_any = _is_any(graph, adapter_ids) if is_skipped_when_unused else None
    by_input: dict[ir.Value, list[Product]] = {}
    for product in products:
        by_input.setdefault(product.input, []).append(product)
    for group in by_input.values():
        _add_slots(graph, group, _Slots(graph, adapter_ids, num_slots, rank), is_any)
    graph.sort()
    found = tuple(target for product in products for target in product.targets)
    return LoraConfig(num_slots, rank, found)


def _is_any(graph: ir.Graph, adapter_ids: ir.Value) -> ir.Value:
    """Whether any row uses an adapter."""
    largest = _node(
        "ReduceMax", [adapter_ids], f"{ANY}.largest", ir.Shape([]), {"keepdims": 0}, dtype=ir.DataType.INT64
    )
    is_any = _node("Cast", [largest.outputs[0]], ANY, ir.Shape([]), {"to": ir.DataType.BOOL}, dtype=ir.DataType.BOOL)
    graph.insert_before(graph[0], [largest, is_any])
    return is_any.outputs[0]


def _add_slots(graph: ir.Graph, group: list[Product], slots: _Slots, is_any: ir.Value | None) -> None:
    """Have everything that reads the outputs of ``group``, which share an input, read them as adapters change them."""
    users = [[(use.node, use.idx) for use in product.output.uses()] for product in group]
    nodes: list[ir.Node] = []
    changed = [slots.change(product, nodes) for product in group]
    if is_any is not None:
        nodes, changed = _branch(group, nodes, changed, is_any)
    last = group[-1].output.producer()
    assert last is not None
    graph.insert_after(last, nodes)
    for product, new, reading in zip(group, changed, users, strict=True):
        assert not product.output.is_graph_output()
        for node, index in reading:
            node.replace_input_with(index, new)


def _branch(
    group: list[Product], nodes: list[ir.Node], changed: list[ir.Value], is_any: ir.Value
) -> tuple[list[ir.Node], list[ir.Value]]:
    """``nodes`` inside an If; what it returns is ``changed``, or the products as they are."""
    module = _common_scope([target.name for product in group for target in product.targets])
    same = [
        _node("Identity", [product.output], f"{new.name}.unchanged", product.output.shape, module=module)
        for product, new in zip(group, changed, strict=True)
    ]
    then = ir.Graph([], changed, nodes=nodes, name=f"{module}.lora")
    otherwise = ir.Graph([], [node.outputs[0] for node in same], nodes=same, name=f"{module}.no_lora")
    branch = ir.Node(
        "",
        "If",
        [is_any],
        [ir.AttrGraph("then_branch", then), ir.AttrGraph("else_branch", otherwise)],
        outputs=[
            _value(f"{new.name}.chosen", product.output.shape) for product, new in zip(group, changed, strict=True)
        ],
        metadata_props={SCOPES: _scopes(module, "If")},
    )
    return [branch], list(branch.outputs)


class _Slots:
    """Makes the nodes that change a product; owner of the inputs it adds to the graph."""

    def __init__(self, graph: ir.Graph, adapter_ids: ir.Value, num_slots: int, rank: int) -> None:
        self._graph = graph
        self._adapter_ids = adapter_ids
        self._num_slots = num_slots
        self._rank = rank

    def change(self, product: Product, nodes: list[ir.Node]) -> ir.Value:
        """``product`` as adapters change it; the nodes that compute it are appended to ``nodes``."""
        module = _common_scope([target.name for target in product.targets])
        deltas = [
            self._padded(self._delta(product, target, nodes), target, before, after, nodes)
            for target, before, after in _paddings(product.parts)
        ]
        delta, shape = deltas[0], product.output.shape
        if len(deltas) > 1:
            delta = _append(nodes, "Concat", deltas, f"lora.{module}.deltas", shape, {"axis": -1}, module)
        return _append(nodes, "Add", [product.output, delta], f"lora.{module}.changed", shape, {}, module)

    def _delta(self, product: Product, target: LoraTarget, nodes: list[ir.Node]) -> ir.Value:
        """(x·A[ids])·B[ids], (B, S, out)."""
        assert product.output.shape is not None
        name, (batch, sequence, _) = f"lora.{target.name}", product.output.shape
        stacked = {"a": (target.in_features, self._rank), "b": (self._rank, target.out_features)}
        value = product.input
        for side, (rows, columns) in stacked.items():
            shape = [self._num_slots + 1, rows, columns]
            matrices = _input(self._graph, f"{name}.{side}", ir.DataType.FLOAT, shape)
            chosen = _append(
                nodes,
                "Gather",
                [matrices, self._adapter_ids],
                f"{name}.{side}.chosen",
                ir.Shape([batch, rows, columns]),
                {"axis": 0},
                target.name,
            )
            shape_after = ir.Shape([batch, sequence, columns])
            value = _append(nodes, "MatMul", [value, chosen], f"{name}.{side}.product", shape_after, {}, target.name)
        return value

    def _padded(self, delta: ir.Value, target: LoraTarget, before: int, after: int, nodes: list[ir.Node]) -> ir.Value:
        """``delta`` between zeros for the features beside it that no adapter changes."""
        if not before and not after:
            return delta
        assert delta.shape is not None
        width = before + target.out_features + after
        sizes = _shared(self._graph, f"lora.padding.{before}.{after}", [before, after])
        inputs = [delta, sizes, None, _shared(self._graph, "lora.padding.axis", [-1])]
        shape = ir.Shape([*delta.shape[:2], width])
        return _append(nodes, "Pad", inputs, f"lora.{target.name}.padded", shape, {}, target.name)


def _paddings(parts: Sequence[Part]) -> list[tuple[LoraTarget, int, int]]:
    """Every target with the number of features before and after it that are no target's."""
    found: list[tuple[LoraTarget, int, int]] = []
    gap = 0
    for part in parts:
        if part.target is not None:
            found.append((part.target, gap, 0))
            gap = 0
        elif found:
            target, before, after = found.pop()
            found.append((target, before, after + part.width))
        else:
            gap += part.width
    return found


def _common_scope(modules: Sequence[str]) -> str:
    """``model.layers.0.self_attn`` for its q_proj and k_proj; a single module is its own."""
    paths = [module.split(".") for module in modules]
    shared = [names[0] for names in itertools.takewhile(lambda names: len(set(names)) == 1, zip(*paths, strict=False))]
    return ".".join(shared)


def _append(
    nodes: list[ir.Node],
    op_type: str,
    inputs: Sequence[ir.Value | None],
    name: str,
    shape: ir.Shape | None,
    attributes: Mapping[str, Any],
    module: str,
) -> ir.Value:
    nodes.append(_node(op_type, inputs, name, shape, attributes, module=module))
    return nodes[-1].outputs[0]


def _node(
    op_type: str,
    inputs: Sequence[ir.Value | None],
    name: str,
    shape: ir.Shape | None,
    attributes: Mapping[str, Any] | None = None,
    *,
    module: str = "",
    dtype: ir.DataType = ir.DataType.FLOAT,
) -> ir.Node:
    """A node with one output ``name``, said to come from the part ``lora`` of ``module``."""
    node = ir.node(op_type, inputs, attributes, outputs=[_value(name, shape, dtype)])
    node.metadata_props[SCOPES] = _scopes(module, op_type)
    return node


def _scopes(module: str, op_type: str) -> str:
    return repr([f"{WRAPPER_SCOPE}{module}.lora" if module else f"{WRAPPER_SCOPE}lora", op_type])


def _value(name: str, shape: ir.Shape | None, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
    return ir.Value(name=name, shape=shape, type=ir.TensorType(dtype))


def _input(graph: ir.Graph, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
    value = _value(name, ir.Shape(shape), dtype)
    graph.inputs.append(value)
    return value


def _shared(graph: ir.Graph, name: str, numbers: Sequence[int]) -> ir.Value:
    return graph.initializers.get(name) or initializer(graph, name, np.array(numbers, np.int64))
