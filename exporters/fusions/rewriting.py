"""Small words for reading and changing a graph that the rules share; they know nothing of models."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

SCOPES = "pkg.torch.onnx.name_scopes"
"""Where the tracer notes a node's modules, outermost first, with the traced operation as the last entry."""

PARTS = "llmos.parts"
"""Key in ``meta`` of a product that was packed from several: see ``attention``."""


def producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node that makes ``value`` if it is an ``op_type``."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type else None


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The numbers of an initializer."""
    if value is None or not value.is_initializer() or value.const_value is None:
        return None
    return value.const_value.numpy()


def attribute(node: ir.Node, name: str, default: Any) -> Any:
    found = node.attributes.get(name)
    return default if found is None else found.value


def dims(value: ir.Value) -> tuple[int | str, ...] | None:
    """Shape with every size known by number or by name, else None."""
    if value.shape is None:
        return None
    found = tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape)
    return None if None in found else found  # type: ignore[return-value]


def only_user(value: ir.Value) -> ir.Node | None:
    """The one node that reads ``value``, unless it is read elsewhere too or leaves the graph."""
    users = list(value.uses())
    return users[0].node if len(users) == 1 and not value.is_graph_output() else None


def insert_before(
    place: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, Any] | None = None,
    *,
    like: ir.Value,
    shape: ir.Shape | None = None,
    domain: str = "",
    module: str | None = None,
    name: str | None = None,
) -> ir.Value:
    """Add a node before ``place`` and return its first output, typed like ``like``.

    It is said to come from the module of ``place``, or from ``module`` inside of that.
    """
    output = ir.Value(name=name, shape=shape if shape is not None else like.shape, type=like.type)
    node = ir.node(op_type, inputs, attributes, domain=domain, outputs=[output])
    node.metadata_props[SCOPES] = repr([*scopes_of(place)[:-1], *([module] if module else []), op_type])
    place.prepend(node)
    return output


def scopes_of(node: ir.Node) -> list[str]:
    """Module paths of ``node``, outermost first, and its operation; empty if the tracer noted none."""
    return ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))


def module_of(node: ir.Node) -> str:
    return "".join(scopes_of(node)[-2:-1])


def initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """Add a constant to ``graph`` under ``name``, or with a number if that is taken."""
    unique, number = name, 0
    while unique in graph.initializers:
        number += 1
        unique = f"{name}_{number}"
    tensor = ir.Tensor(np.asarray(array, order="C"), name=unique)
    value = ir.Value(name=unique, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def shape_constant(graph: ir.Graph, sizes: Sequence[int]) -> ir.Value:
    """A constant to reshape to; 0 keeps the size of that axis. Equal ones are shared."""
    name = "shape." + "x".join(map(str, sizes))
    return graph.initializers.get(name) or initializer(graph, name, np.array(sizes, np.int64))


def replace(old: ir.Value, new: ir.Value) -> None:
    """Have everything that reads ``old`` read ``new``; a graph output keeps its own node instead."""
    assert not old.is_graph_output()
    old.replace_all_uses_with(new)
