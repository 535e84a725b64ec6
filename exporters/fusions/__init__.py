"""Fewer and larger nodes: rewrites of the traced graph that leave its results and its inputs and outputs as they are.

    projections  a product written over flattened tokens, or a norm behind a transpose  →  on (B, S, ·)
    attention    rotary, packing and layout of queries, keys and values                 →  inside GroupQueryAttention
    bidirectional the same for encoders                                                 →  MultiHeadAttention
    reshapes     reshapes that end where they began, shapes put together at run time    →  nothing, constants
    skips        residual sum and the norm of it                                        →  one node
    biases       of projections into bidirectional attention, activations and norms     →  inside those nodes

No rule knows an architecture. What stands between a projection and its attention node is not matched against a
pattern but run and measured (``paths``, ``routing``); what no rule understands stays as it was traced.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from exporters.fusions.attention import fuse_attention
from exporters.fusions.biases import fuse_biases
from exporters.fusions.bidirectional import fuse_bidirectional
from exporters.fusions.projections import unflatten_products, untranspose_norms
from exporters.fusions.reshapes import remove_round_trips, settle_shapes
from exporters.fusions.skips import fuse_skips

__all__ = ["fuse"]


def fuse(model: ir.Model, num_positions: int) -> None:
    """Rewrite ``model`` in place. ``num_positions`` is the longest sequence that it will hold, in tokens."""
    graph = model.graph
    unflatten_products(graph)
    untranspose_norms(graph)
    fuse_attention(model, num_positions)
    fuse_bidirectional(graph, num_positions)
    remove_round_trips(graph)
    settle_shapes(graph)
    fuse_skips(graph)
    RemoveUnusedNodesPass()(model)  # a bias that a forgotten node reads too stays where it is
    fuse_biases(graph)
    RemoveUnusedNodesPass()(model)
    model.opset_imports.setdefault("com.microsoft", 1)
