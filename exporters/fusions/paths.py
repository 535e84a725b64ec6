"""What lies between a projection and an attention node: found in the graph, then run by itself.

Between them are only nodes that move numbers about (reshape, transpose, slice …) and nodes that combine them with
coefficients made from the positions (rotary). All of it is linear in the projection's output, so running it on a few
well-chosen inputs tells what it does, however it is written. ``Path`` is that part of the graph; ``run`` is it alone.

    projection ── Reshape ── Transpose ── [× cos, + rotated × sin] ── Transpose ── Reshape ── attention
      source      └────────────────────────── path ──────────────────────────────┘            target
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

MOVES = {"Reshape", "Transpose", "Unsqueeze", "Squeeze", "Slice", "Split", "Concat", "Gather", "Expand", "Identity"}
MAX_ELEMENTS_PER_RUN = 1 << 22
CONTRACT = ("input_ids", "attention_mask", "position_ids")
"""Inputs of a graph whose sizes, or positions, a path may depend on."""


class Path:
    """The part of a graph from ``source`` (B, S, …) to ``target`` (B, S, width); a width is features per token."""

    def __init__(self, source: ir.Value, target: ir.Value, nodes: set[ir.Node]) -> None:
        assert source.shape is not None and target.shape is not None
        self.source = source
        self.target = target
        self.nodes = nodes
        self.source_shape: tuple[int, ...] = tuple(int(dim) for dim in source.shape[2:])  # type: ignore[arg-type]
        self.source_width = math.prod(self.source_shape)
        self.width = int(target.shape[2])  # type: ignore[arg-type]
        assert source.graph is not None
        self._asked = {value.name for value in source.graph.inputs}
        self._session: ort.InferenceSession | None = None

    def run(self, features: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """(T, source_width) features of T tokens at ``positions`` (T,) → (T, width)."""
        if not self.nodes:
            return features
        size = max(1, MAX_ELEMENTS_PER_RUN // max(self.source_width, self.width))
        parts = [
            self._run(features[start : start + size], positions[start : start + size])
            for start in range(0, len(positions), size)
        ]
        return np.concatenate(parts)

    def _run(self, features: np.ndarray, positions: np.ndarray) -> np.ndarray:
        num_tokens = len(positions)
        if self._session is None:
            self._session = self._open()
        if "position_ids" in self._asked:
            return self._call(features, positions)
        # Without position_ids, as in an encoder, a token's place is its position.
        found = np.empty((num_tokens, self.width), np.float32)
        waiting = np.arange(num_tokens)
        while len(waiting):
            places, chosen = np.unique(positions[waiting], return_index=True)
            tokens = waiting[chosen]
            row = np.zeros((int(places[-1]) + 1, self.source_width), np.float32)
            row[places] = features[tokens]
            found[tokens] = self._call(row, np.arange(len(row)))[places]
            waiting = np.delete(waiting, chosen)
        return found

    def _call(self, features: np.ndarray, positions: np.ndarray) -> np.ndarray:
        assert self._session is not None
        num_tokens = len(positions)
        inputs = {
            "input_ids": np.zeros((1, num_tokens), np.int64),
            "attention_mask": np.ones((1, num_tokens), np.int64),
            "position_ids": positions.astype(np.int64)[None],
            str(self.source.name): features.astype(np.float32).reshape(1, num_tokens, *self.source_shape),
        }
        wanted = {node.name for node in self._session.get_inputs()}
        (found,) = self._session.run(None, {name: array for name, array in inputs.items() if name in wanted})
        return found.reshape(num_tokens, self.width)

    def _open(self) -> ort.InferenceSession:
        graph = self.source.graph
        assert graph is not None
        contract = [value for value in graph.inputs if value.name in CONTRACT]
        part = ir.convenience.extract(graph, [*contract, self.source], [self.target])
        model = ir.Model(part, ir_version=10)
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, ["CPUExecutionProvider"])


class PathFinder:
    """Finds paths in one graph, which may lose nodes but gain none meanwhile. A value that depends on no input but
    ``position_ids`` and on the shapes of others is a coefficient; all others are data.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self._data: set[ir.Value] = {value for value in graph.inputs if value.name != "position_ids"}
        for node in graph:
            if node.op_type != "Shape" and any(value in self._data for value in node.inputs):
                self._data.update(node.outputs)

    def find(self, target: ir.Value | None) -> Path | None:
        """The longest path that ends in ``target``, or None if more than one projection leads there."""
        if target is None or not _is_per_token(target, rank=3):
            return None
        nodes: set[ir.Node] = set()
        sources: set[ir.Value] = set()
        waiting = [target]
        while waiting:
            value = waiting.pop()
            node = value.producer()
            if node in nodes:
                continue
            inputs = self._passed_on(node) if node is not None else None
            if node is None or inputs is None:
                sources.add(value)
            else:
                nodes.add(node)
                waiting += inputs
        if len(sources) != 1:
            return None
        (source,) = sources
        return Path(source, target, nodes) if _is_per_token(source) else None

    def _passed_on(self, node: ir.Node) -> list[ir.Value] | None:
        """The data inputs of ``node`` if its output is linear in them and adds nothing else, else None."""
        data = [value for value in node.inputs if value in self._data and value is not None]
        rest = [value for value in node.inputs if value is not None and value not in self._data]
        if node.domain not in ("", "ai.onnx"):
            return None
        if node.op_type in MOVES or node.op_type == "Neg":
            # Everything but the tensor that is moved must be known without data.
            is_known = node.op_type == "Concat" or node.inputs[0] in data
            return data if is_known and (node.op_type == "Concat" or len(data) == 1) else None
        if node.op_type in ("Add", "Sub"):
            return data if len(data) == 2 else None
        if node.op_type == "Mul":
            return data if len(data) == 1 and not any(map(_is_weight, rest)) else None
        return None


def _is_weight(value: ir.Value) -> bool:
    return value.is_initializer() and value.const_value is not None and value.const_value.size > 1


def _is_per_token(value: ir.Value, rank: int | None = None) -> bool:
    """Whether ``value`` is (B, S, numbers …) and float32."""
    if value.shape is None or len(value.shape) < 3 or (rank is not None and len(value.shape) != rank):
        return False
    batch, sequence, *features = value.shape
    names = [dim.value if isinstance(dim, ir.SymbolicDim) else dim for dim in (batch, sequence)]
    return names == ["batch", "sequence"] and all(isinstance(dim, int) for dim in features)


def users_of(values: Iterable[ir.Value]) -> set[ir.Node]:
    return set(itertools.chain.from_iterable((use.node for use in value.uses()) for value in values))
