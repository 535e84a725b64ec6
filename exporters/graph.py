"""The traced graph on disk: readable names, no traces of the machine that made it, weights in one file beside it.

/model/layers.0/self_attn/q_proj/MatMul            a node is named after the module that emitted it
model.layers.0.self_attn.q_proj.weight             a weight keeps its name in the checkpoint
model.layers.0.self_attn.q_proj.weight_transposed  or says what became of it
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch.onnx import ONNXProgram

from exporters.fusions.rewriting import module_of

PRODUCER = "llmos"
WRAPPER_SCOPE = "model."
"""The traced module holds the checkpoint's model under this name."""
NO_SCOPE = "_empty_nn_module_stack_from_metadata_hook"
"""What the tracer calls the scope of a shape that it reads from an input."""
LAYER = re.compile(r"\.(\d+)(?:\.|$)")
"""The number of the decoder layer in a module's path."""


@dataclass(frozen=True)
class GraphSize:
    """Nodes of a graph, and of its largest decoder layer: a small model's speed is a matter of how many there are."""

    num_nodes: int
    num_nodes_per_layer: int


def graph_size(model: ir.Model) -> GraphSize:
    """Before ``save_graph``, which forgets the modules that emitted the nodes."""
    layers = Counter(match[1] for node in model.graph if (match := LAYER.search(module_of(node))))
    return GraphSize(len(model.graph), max(layers.values(), default=0))


def save_graph(program: ONNXProgram, path: Path) -> None:
    """Write ``path`` and ``path``.data."""
    model = program.model
    _name_nodes(model.graph)
    _name_weights(model.graph)
    # The tracer records stack traces, with the paths of this machine, at every node.
    ClearMetadataAndDocStringPass()(model)
    model.graph.metadata_props.clear()
    model.producer_name, model.producer_version = PRODUCER, None
    program.save(path, external_data=True)


def _name_nodes(graph: ir.Graph) -> None:
    numbers: Counter[str] = Counter()
    for node in ir.traversal.RecursiveGraphIterator(graph):
        module = module_of(node)
        name = _node_name("" if module == NO_SCOPE else _without_wrapper(f"{module}."), node.op_type)
        node.name = f"{name}_{numbers[name]}" if numbers[name] else name
        numbers[name] += 1


def _node_name(module: str, op_type: str) -> str:
    """``model.layers.0.mlp.`` and ``Mul`` → ``/model/layers.0/mlp/Mul``."""
    path = re.sub(r"/(\d+)/", r".\1/", f"/{module.replace('.', '/')}".replace("//", "/"))
    return f"{path.rstrip('/')}/{op_type}"


def _name_weights(graph: ir.Graph) -> None:
    for value in list(graph.initializers.values()):
        name = _without_wrapper(weight_name(value))
        if name not in graph.initializers:
            value.name = name


def weight_name(value: ir.Value) -> str:
    """The name of a weight in the traced model; one that the optimizer made says what it was made from."""
    assert value.name is not None
    folded_from = ast.literal_eval(value.metadata_props.get("pkg.onnxscript.optimizer.folded_from", "[]"))
    if len(folded_from) == 1 and folded_from[0].startswith(WRAPPER_SCOPE):
        # What the optimizer does to a single matrix is to transpose it for its MatMul.
        return f"{folded_from[0]}_{'transposed' if len(value.shape or ()) == 2 else 'folded'}"
    return value.name


def _without_wrapper(name: str) -> str:
    return name.removeprefix(WRAPPER_SCOPE)
