"""Queries, keys and values of bidirectional attention, straight from their projections.

    q_proj ─ layout ─ rotary ─ layout ─┐                          q_proj ─ RotaryEmbedding ─┐
    k_proj ─ layout ─ rotary ─ layout ─┤ MultiHeadAttention   →   k_proj ─ RotaryEmbedding ─┤ MultiHeadAttention
    v_proj ─ layout ───────────────────┘                          v_proj ───────────────────┘

As in ``attention``, what lies between is run and measured, not matched. Tokens of an encoder are numbered from 0, so a
path is asked about a position by putting a token there. A product that is split into queries, keys and values becomes
one product each: ONNX Runtime's CPU kernel takes no packed ones.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from exporters.fusions.attention import Projection, _projection_of
from exporters.fusions.paths import Path, PathFinder, users_of
from exporters.fusions.rewriting import attribute, constant, initializer, insert_before, module_of
from exporters.fusions.routing import Angles, Probe, Routing

NUM_PROBED_POSITIONS = 64
"""Rotary is told from its first positions; the tables are then made for all."""
PARTS = ("q_proj", "k_proj", "v_proj")


def fuse_bidirectional(graph: ir.Graph, num_positions: int) -> None:
    """Rewrite what leads to every MultiHeadAttention of ``graph``; rows hold at most ``num_positions`` tokens."""
    nodes = [node for node in graph if node.op_type == "MultiHeadAttention"]
    if not nodes:
        return
    finder = PathFinder(graph)
    probe = Probe(min(num_positions, NUM_PROBED_POSITIONS))
    tables = _Tables(graph, probe, num_positions)
    # All are measured before anything changes: new nodes are none of the traced values that the finder knows.
    measured = [(node, _measure(node, finder, probe)) for node in nodes]
    angles = [
        [tables.of(path, routing, attribute(node, "num_heads", 1)) for path, routing, _ in routes]
        for node, routes in measured
    ]
    for (node, routes), turned in zip(measured, angles, strict=True):
        if routes:
            _rewrite(graph, node, routes, turned)


def _measure(node: ir.Node, finder: PathFinder, probe: Probe) -> list[tuple[Path, Routing, Projection]]:
    """One route for each of query, key and value; none at all if one of them is not understood."""
    routes = []
    for index, value in enumerate(node.inputs[:3]):
        path = finder.find(value)
        routing = probe.measure(path, attribute(node, "num_heads", 1)) if path is not None else None
        projection = _projection_of(path.source) if path is not None else None
        if path is None or routing is None or projection is None or len(path.source_shape) != 1:
            return []
        is_repeated = len(np.unique(routing.columns)) < len(routing.columns)  # heads that share keys and values
        if is_repeated or (index == 2 and (routing.angles is not None or routing.gain != 1.0)):
            return []
        routes.append((path, routing, projection))
    inside = set().union(*(path.nodes for path, _, _ in routes)) | {node}
    return routes if users_of(path.source for path, _, _ in routes) <= inside else []


def _rewrite(
    graph: ir.Graph,
    node: ir.Node,
    routes: list[tuple[Path, Routing, Projection]],
    turned: list[tuple[ir.Value, ir.Value, Angles] | None],
) -> None:
    num_heads = attribute(node, "num_heads", 1)
    for index, (path, routing, projection) in enumerate(routes):
        value = path.source
        if not (routing.is_straight and path.width == path.source_width):
            value = _selected(graph, node, path, routing, projection, f"{module_of(node)}.{PARTS[index]}")
        table = turned[index]
        if table is not None:
            cos, sin, angles = table
            width = 2 * angles.cos.shape[1]
            start = graph.initializers.get("rotary.start")
            start = start if start is not None else initializer(graph, "rotary.start", np.zeros(1, np.int64))
            attributes = {"num_heads": num_heads, "interleaved": int(angles.is_interleaved)}
            if width < path.width // num_heads:
                attributes["rotary_embedding_dim"] = width
            value = insert_before(
                node, "RotaryEmbedding", [value, start, cos, sin], attributes, like=value, domain="com.microsoft"
            )
        node.replace_input_with(index, value)
    gain = routes[0][1].gain * routes[1][1].gain
    if gain != 1.0:
        node.attributes["scale"] = ir.AttrFloat32("scale", attribute(node, "scale", 1.0) * gain)


def _selected(
    graph: ir.Graph, node: ir.Node, path: Path, routing: Routing, projection: Projection, name: str
) -> ir.Value:
    """The features of ``path`` by a product of their own, in the order in which they arrive."""
    matrix, source = constant(projection.weight), path.source
    assert matrix is not None and source.shape is not None
    shape = ir.Shape([*source.shape[:2], path.width])
    weight = initializer(graph, f"{name}.weight_transposed", matrix[:, routing.columns])
    product = insert_before(node, "MatMul", [projection.input, weight], like=source, shape=shape, module=name)
    vector = constant(projection.bias)
    if vector is None:
        return product
    bias = initializer(graph, f"{name}.bias", vector[routing.columns])
    return insert_before(node, "Add", [product, bias], like=source, shape=shape, module=name)


class _Tables:
    """The cos and sin constants of one graph; layers with the same angles share them."""

    def __init__(self, graph: ir.Graph, probe: Probe, num_positions: int) -> None:
        self._graph = graph
        self._probe = probe
        self._num_positions = num_positions
        self._tables: list[tuple[Angles, ir.Value, ir.Value]] = []

    def of(self, path: Path, routing: Routing, num_heads: int) -> tuple[ir.Value, ir.Value, Angles] | None:
        sampled = routing.angles
        if sampled is None:
            return None
        for known, cos, sin in self._tables:
            if (
                known.is_interleaved == sampled.is_interleaved
                and np.array_equal(known.cos, sampled.cos)
                and np.array_equal(known.sin, sampled.sin)
            ):
                return cos, sin, sampled
        width, positions = 2 * sampled.cos.shape[1], np.arange(self._num_positions)
        full = self._probe.angles(path, routing.columns, num_heads, width, sampled.is_interleaved, positions)
        cos = initializer(self._graph, "rotary.cos_cache", full.cos)
        sin = initializer(self._graph, "rotary.sin_cache", full.sin)
        self._tables.append((sampled, cos, sin))
        return cos, sin, sampled
