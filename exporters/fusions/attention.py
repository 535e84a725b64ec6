"""Queries, keys and values straight from their projections into GroupQueryAttention.

    q_proj ─ layout ─ rotary ─ layout ─┐
    k_proj ─ layout ─ rotary ─ layout ─┤ GroupQueryAttention     qkv_proj ─ GroupQueryAttention(do_rotary=1)
    v_proj ─ layout ───────────────────┘                    →    cos, sin ─┘

Rotary moves into the node if queries and keys are turned by the same angles and the operator takes their width; cos and
sin are then constants of the graph, computed by the model's own rotary. The operator derives positions from row
lengths. The three products become one if they read the same input; columns of the weights are put in the order in
which the node expects them, so that neither splits nor transposes are needed. Where only a part applies (norms between
projection and rotary, say), only that part is done.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from exporters.fusions.paths import Path, PathFinder, users_of
from exporters.fusions.rewriting import (
    PARTS,
    attribute,
    constant,
    initializer,
    insert_before,
    module_of,
    producer,
    shape_constant,
)
from exporters.fusions.routing import Angles, Probe, Routing

COS, SIN = 7, 8
"""Inputs of GroupQueryAttention; 0, 1, 2 are query, key and value."""
QKV = "qkv_proj"


@dataclass(frozen=True)
class Projection:
    """``input`` (B, S, E) times ``weight`` (E, N) plus ``bias`` (N), as ``module`` computes it."""

    input: ir.Value
    weight: ir.Value
    bias: ir.Value | None
    module: str


@dataclass(frozen=True)
class Route:
    """One of query, key and value: its path and what that does."""

    path: Path
    routing: Routing


def fuse_attention(model: ir.Model, num_positions: int) -> None:
    """Rewrite what leads to every GroupQueryAttention of ``model``; rows hold at most ``num_positions`` tokens."""
    graph = model.graph
    finder, probe = PathFinder(graph), Probe(num_positions)
    tables = AngleTables(graph, probe)
    # All are measured before anything changes: new nodes are none of the traced values that the finder knows.
    measured = [
        (node, _measure(node, finder, probe))
        for node in graph
        if node.op_type == "GroupQueryAttention" and len(node.inputs) >= 7 and node.inputs[2] is not None
    ]
    changes = [(node, routes, *_shared_angles(node, routes)) for node, routes in measured]
    ready = [
        (node, routes, scale, tables.of(routes[1], angles) if angles is not None and routes[1] is not None else None)
        for node, routes, angles, scale in changes
    ]
    for node, routes, scale, table in ready:
        _rewrite(graph, node, routes, scale, table)


def _measure(node: ir.Node, finder: PathFinder, probe: Probe) -> list[Route | None]:
    num_heads, num_kv_heads = attribute(node, "num_heads", 0), attribute(node, "kv_num_heads", 0)
    routes: list[Route | None] = []
    for value, heads in zip(node.inputs[:3], (num_heads, num_kv_heads, num_kv_heads), strict=True):
        path = finder.find(value)
        routing = probe.measure(path, heads) if path is not None else None
        routes.append(Route(path, routing) if path is not None and routing is not None else None)
    return routes


def _shared_angles(node: ir.Node, routes: list[Route | None]) -> tuple[Angles | None, float | None]:
    """(angles, factor of the node's scale): angles are those of queries and keys if the node can turn both by them.

    The factor is None if queries and keys cannot bypass their paths.
    """
    query, key, _ = routes
    if query is None or key is None:
        return None, None
    turned, by = query.routing.angles, key.routing.angles
    if turned is None and by is None:
        return None, query.routing.gain * key.routing.gain
    if turned is None or by is None or turned.is_interleaved != by.is_interleaved or turned.cos.shape != by.cos.shape:
        return None, None
    num_kv_heads = attribute(node, "kv_num_heads", 1)
    head_size, width = key.path.width // num_kv_heads, by.cos.shape[1]
    if head_size % 16 or width % 8:  # asked by the operator
        return None, None
    factor = float(turned.cos[0, 0] / by.cos[0, 0])
    is_same = np.allclose(turned.cos, by.cos * factor, atol=1e-6) and np.allclose(
        turned.sin, by.sin * factor, atol=1e-6
    )
    return (by, factor) if is_same else (None, None)


class AngleTables:
    """The cos and sin constants of one graph; layers with the same angles share them."""

    def __init__(self, graph: ir.Graph, probe: Probe) -> None:
        self._graph = graph
        self._probe = probe
        self._tables: list[tuple[Angles, ir.Value, ir.Value]] = []

    def of(self, route: Route, sampled: Angles) -> tuple[ir.Value, ir.Value, bool]:
        """(cos, sin, is_interleaved) for every position; ``sampled`` are those of ``route`` where it was probed."""
        for known, cos, sin in self._tables:
            if (
                known.is_interleaved == sampled.is_interleaved
                and np.array_equal(known.cos, sampled.cos)
                and np.array_equal(known.sin, sampled.sin)
            ):
                return cos, sin, sampled.is_interleaved
        num_heads = route.path.width // _head_size(route)
        positions = np.arange(self._probe.num_positions)
        width = 2 * sampled.cos.shape[1]
        full = self._probe.angles(
            route.path, route.routing.columns, num_heads, width, sampled.is_interleaved, positions
        )
        cos = initializer(self._graph, "rotary.cos_cache", full.cos)
        sin = initializer(self._graph, "rotary.sin_cache", full.sin)
        self._tables.append((sampled, cos, sin))
        return cos, sin, sampled.is_interleaved


def _head_size(route: Route) -> int:
    # Layers that share keys read the same target, and agree on its heads.
    node = next(node for node in users_of([route.path.target]) if node.op_type == "GroupQueryAttention")
    return route.path.width // attribute(node, "kv_num_heads", 1)


def _rewrite(
    graph: ir.Graph,
    node: ir.Node,
    routes: list[Route | None],
    scale: float | None,
    table: tuple[ir.Value, ir.Value, bool] | None,
) -> None:
    query, key, value = routes
    is_value_plain = value is not None and value.routing.angles is None and value.routing.gain == 1.0
    packed = None
    if scale is not None and query and key and value and is_value_plain:
        packed = _pack(graph, node, [query, key, value])
    if packed is not None:
        node.replace_input_with(0, packed)
        node.replace_input_with(1, None)
        node.replace_input_with(2, None)
    else:
        if is_value_plain and value is not None and value.routing.is_straight:
            node.replace_input_with(2, _flat(node, value.path))
        if scale is None or not (query and key and query.routing.is_straight and key.routing.is_straight):
            return
        node.replace_input_with(0, _flat(node, query.path))
        node.replace_input_with(1, _flat(node, key.path))

    assert scale is not None and query is not None
    if scale != 1.0:
        head_size = query.path.width // attribute(node, "num_heads", 1)
        node.attributes["scale"] = ir.AttrFloat32("scale", attribute(node, "scale", head_size**-0.5) * scale)
    if table is not None:
        cos, sin, is_interleaved = table
        node.resize_inputs(max(len(node.inputs), SIN + 1))
        node.replace_input_with(COS, cos)
        node.replace_input_with(SIN, sin)
        node.attributes["do_rotary"] = ir.AttrInt64("do_rotary", 1)
        if is_interleaved:
            node.attributes["rotary_interleaved"] = ir.AttrInt64("rotary_interleaved", 1)


def _flat(node: ir.Node, path: Path) -> ir.Value:
    """The source of ``path`` as (B, S, width)."""
    if len(path.source_shape) == 1:
        return path.source
    assert node.graph is not None and isinstance(node.graph, ir.Graph) and path.source.shape is not None
    shape = shape_constant(node.graph, (0, 0, path.source_width))
    dims = ir.Shape([*path.source.shape[:2], path.source_width])
    return insert_before(node, "Reshape", [path.source, shape], like=path.source, shape=dims)


def _pack(graph: ir.Graph, node: ir.Node, routes: list[Route]) -> ir.Value | None:
    """One product for query, key and value, (B, S, (H + 2·KV)·D), or None if they do not read the same input."""
    projections = [_projection_of(route.path.source) for route in routes]
    found = [projection for projection in projections if projection is not None]
    if len(found) < 3 or any(projection.input is not found[0].input for projection in found):
        return None
    inside = set().union(*(route.path.nodes for route in routes)) | {node}
    if not users_of(route.path.source for route in routes) <= inside:
        return None  # something else reads the product too, so it would be computed twice
    columns = [route.routing.columns for route in routes]
    name = f"{module_of(node)}.{QKV}"
    weight, bias = found[0].weight, found[0].bias
    is_one = all(projection.weight is weight for projection in found)
    if not is_one or not np.array_equal(np.concatenate(columns), np.arange(int(weight.shape[1]))):  # type: ignore
        weight = initializer(graph, f"{name}.weight_transposed", _packed([p.weight for p in found], columns))
        if any(projection.bias is not None for projection in found):
            bias = initializer(graph, f"{name}.bias", _packed([p.bias for p in found], columns))
    assert weight.shape is not None
    source = routes[0].path.source
    assert source.shape is not None
    shape = ir.Shape([*source.shape[:2], weight.shape[1]])
    product = insert_before(node, "MatMul", [found[0].input, weight], like=source, shape=shape, module=name)
    multiplication = product.producer()
    assert multiplication is not None
    multiplication.meta[PARTS] = _parts(found, columns)
    if bias is None:
        return product
    return insert_before(node, "Add", [product, bias], like=source, shape=shape, module=name)


def _parts(projections: list[Projection], columns: list[np.ndarray]) -> list[tuple[str, np.ndarray]]:
    """(module, its columns in their new order) of every module whose output features lie side by side."""
    parts: list[tuple[str, np.ndarray]] = []
    for projection, order in zip(projections, columns, strict=True):
        if parts and parts[-1][0] == projection.module:
            order = np.concatenate((parts.pop()[1], order))
        parts.append((projection.module, order))
    return parts


def _packed(parts: list[ir.Value | None], columns: list[np.ndarray]) -> np.ndarray:
    """Weights (E, N) or biases (N) side by side, each with its columns in the order ``columns``; None stands for 0."""
    arrays = []
    for part, order in zip(parts, columns, strict=True):
        array = constant(part)
        arrays.append(np.zeros(len(order), np.float32) if array is None else array[..., order])
    return np.concatenate(arrays, axis=-1)


def _projection_of(value: ir.Value) -> Projection | None:
    node = producer(value, "Add")
    bias: ir.Value | None = None
    if node is not None:
        product, bias = node.inputs if node.inputs[1] is not None and _rank(node.inputs[1]) == 1 else node.inputs[::-1]
        if product is None or bias is None or constant(bias) is None or _rank(bias) != 1:
            return None
        value = product
    node = producer(value, "MatMul")
    if node is None or node.inputs[0] is None or _rank(node.inputs[1]) != 2 or constant(node.inputs[1]) is None:
        return None
    assert node.inputs[1] is not None
    return Projection(node.inputs[0], node.inputs[1], bias, module_of(node))


def _rank(value: ir.Value | None) -> int | None:
    return None if value is None or value.shape is None else len(value.shape)
