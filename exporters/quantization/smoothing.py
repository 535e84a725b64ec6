"""Smoothing: outlying activations made smaller, and the weights that they meet larger by as much (SmoothQuant).

    norm · g ─ x ─ MatMul W              norm · g/s ─ x/s ─ MatMul s·W
    gate ── Mul ─ x ─ MatMul W     →     gate ── Mul ─ x/s ─ MatMul s·W
    MatMul U ┘                           MatMul U/s ┘

with one s per feature, ``max|x|^α / max|W|^(1 − α)``, from what x is seen to be on calibration tokens. A row's scale is
set by its largest feature, so features that are large for every token cost all others their last bits; a weight's
feature has no such neighbours. The graph's results stay the same but for rounding; nothing is added to it.

Only where s can be absorbed without a node of its own: x comes from a norm, or from a product that is then multiplied
by something, and is read by products with constant matrices alone. A matrix that is read elsewhere too (a tied head)
stays as it is.

SmoothQuant: Xiao et al. 2023, https://arxiv.org/abs/2211.10438
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from exporters.errors import InvalidConfig
from exporters.fusions.rewriting import constant, only_user
from exporters.quantization.products import Constants, by_input, drop, find_products, is_matrix

ALPHA = 0.5
"""How much of the outliers moves into the weights; 0.5 is the paper's value for most models."""
MAX_TEXTS = 32
MAX_TEXT_TOKENS = 512
"""What a calibration text is cut into; maxima change little after some thousand tokens."""
SMALLEST = 1e-4
"""Features that are hardly ever used count as if they reached this part of the largest one's maximum."""
NORMS = {
    "SimplifiedLayerNormalization": (1,),
    "LayerNormalization": (1, 2),
    "SkipSimplifiedLayerNormalization": (2,),
    "SkipLayerNormalization": (2, 3),
}
"""Inputs that scale the first output: weight, and bias where there is one."""


@dataclass(frozen=True)
class Group:
    """``value`` (…, K), the MatMuls that read it, and what divides it by s when it is divided by s: inputs of nodes,
    each a constant whose last axis has K features."""

    value: ir.Value
    readers: list[ir.Node]
    sources: list[tuple[ir.Node, int]]


def smooth(model: ir.Model, calibration: Sequence[np.ndarray], alpha: float = ALPHA) -> int:
    """Change the weights of ``model`` by what ``calibration``, token ids (S,) of some texts, shows of its activations.

    Returns how many values were smoothed.
    """
    groups = find_groups(model.graph)
    if not groups:
        return 0
    constants = Constants(model.graph)
    maxima = largest_activations(model, [group.value for group in groups], calibration)
    for group, activations in zip(groups, maxima, strict=True):
        weights = np.max([np.abs(_weight(node, 1)).max(axis=1) for node in group.readers], axis=0)
        scale = (_floored(activations) ** alpha / _floored(weights) ** (1 - alpha)).astype(np.float32)
        for node in group.readers:
            _multiply(constants, node, 1, scale[:, None])
        for node, index in group.sources:
            _multiply(constants, node, index, 1 / scale)
    return len(groups)


def read_calibration(path: Path, encode: Callable[[str], list[int]], max_len: int) -> list[np.ndarray]:
    """Token ids (S,) of the pieces of a text file, of at most ``max_len`` tokens; InvalidConfig if there are none."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidConfig(f"calibration has value {str(path)!r}; expected a text file in UTF-8 ({error})") from error
    size = min(max_len, MAX_TEXT_TOKENS)
    # Encoding all of a long file would take longer than everything else; no tokenizer makes 32 characters a token.
    ids = np.array(encode(text[: 32 * size * MAX_TEXTS]), np.int64)
    if not len(ids):
        raise InvalidConfig(f"calibration has value {str(path)!r}, which is empty; expected some pages of typical text")
    return [ids[start : start + size] for start in range(0, min(len(ids), size * MAX_TEXTS), size)]


def find_groups(graph: ir.Graph) -> list[Group]:
    groups = []
    for products in by_input(find_products(graph)):
        value, readers = products[0].input, [product.node for product in products]
        is_read_elsewhere = value.is_graph_output() or {use.node for use in value.uses()} != set(readers)
        if is_read_elsewhere or not all(_is_own_matrix(node.inputs[1]) for node in readers):
            continue
        if (sources := _sources(value)) is not None:
            groups.append(Group(value, readers, sources))
    return groups


def _sources(value: ir.Value) -> list[tuple[ir.Node, int]] | None:
    """What to divide to have ``value`` divided, feature by feature; None if that cannot be done."""
    node = value.producer()
    if node is None:
        return None
    if node.op_type in NORMS and value is node.outputs[0]:
        inputs = [(node, index) for index in NORMS[node.op_type] if index < len(node.inputs) and node.inputs[index]]
        return inputs if all(constant(node.inputs[index]) is not None for _, index in inputs) else None
    if node.op_type == "Mul":
        for factor in node.inputs:
            if factor is None or factor.shape is None or value.shape is None or factor.shape[-1] != value.shape[-1]:
                continue
            if (found := _product_sources(factor)) is not None:
                return found
    return None


def _product_sources(value: ir.Value) -> list[tuple[ir.Node, int]] | None:
    """The matrix, and the bias if any, of a product that only one node reads."""
    node, found = value.producer(), []
    if node is None or only_user(value) is None:
        return None
    if node.op_type == "Add":
        index = 1 if constant(node.inputs[1]) is not None else 0
        bias, summed = node.inputs[index], node.inputs[1 - index]
        if constant(bias) is None or bias is None or summed is None or only_user(summed) is None:
            return None
        if bias.shape != ir.Shape([value.shape[-1]] if value.shape is not None else []):
            return None
        found.append((node, index))
        node = summed.producer()
    if node is None or node.op_type != "MatMul" or not _is_own_matrix(node.inputs[1]):
        return None
    return [*found, (node, 1)]


def _is_own_matrix(value: ir.Value | None) -> bool:
    return value is not None and is_matrix(value) and len(value.uses()) == 1


def _floored(maxima: np.ndarray) -> np.ndarray:
    return np.maximum(maxima, max(float(maxima.max()) * SMALLEST, 1e-30))


def _weight(node: ir.Node, index: int) -> np.ndarray:
    array = constant(node.inputs[index])
    assert array is not None
    return array


def _multiply(constants: Constants, node: ir.Node, index: int, factor: np.ndarray) -> None:
    """Give ``node`` a constant of its own in place of input ``index``; norms often share one."""
    old = node.inputs[index]
    assert old is not None
    product = (_weight(node, index) * factor).astype(np.float32)
    node.replace_input_with(index, constants.instead_of(old, "smoothed", product))
    drop(constants.graph, old)


def largest_activations(
    model: ir.Model, values: Sequence[ir.Value], calibration: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """``max|x|`` over all tokens, per feature (K,), of each of ``values``."""
    found: list[np.ndarray] | None = None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        _write_probe(model, values, path)
        options = ort.SessionOptions()
        options.log_severity_level = 3  # it warns of weights that the outputs do not need
        # Weights are then read from the file where they lie, instead of from a second copy in memory.
        options.add_session_config_entry("session.disable_prepacking", "1")
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        for ids in calibration:
            maxima = session.run(None, _inputs(session, np.asarray(ids, np.int64)))
            found = maxima if found is None else [np.maximum(*pair) for pair in zip(found, maxima, strict=True)]
    assert found is not None
    return found


def _write_probe(model: ir.Model, values: Sequence[ir.Value], path: Path) -> None:
    """A graph that gives the maxima only. Weights go through a file: a message holds no more than 2 GiB."""
    names = [value.name for value in values]
    probe = model.clone()
    by_name = {output.name: output for node in probe.graph for output in node.outputs}
    axes = Constants(probe.graph)
    outputs = []
    for number, name in enumerate(names):
        value = by_name[name]
        assert value.shape is not None
        others = axes.shared(f"axes.{len(value.shape) - 1}", np.arange(len(value.shape) - 1, dtype=np.int64))
        magnitude = ir.node("Abs", [value])
        maximum = ir.node("ReduceMax", [magnitude.outputs[0], others], {"keepdims": 0})
        maximum.outputs[0].name = f"maximum.{number}"
        maximum.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        probe.graph.extend([magnitude, maximum])
        outputs.append(maximum.outputs[0])
    probe.graph.outputs[:] = outputs
    ir.save(probe, path, external_data=f"{path.name}.data")
    for weight in probe.graph.initializers.values():  # a graph refers to itself, so it would keep them for a while
        weight.const_value = None


def _inputs(session: ort.InferenceSession, ids: np.ndarray) -> dict[str, np.ndarray]:
    """One text as the only row of a batch: a whole prompt on an empty cache, or the input of an encoder."""
    num_tokens = len(ids)
    known: dict[str, np.ndarray] = {
        "input_ids": ids[None],
        "position_ids": np.arange(num_tokens, dtype=np.int64)[None],
        "attention_mask": np.ones((1, num_tokens), np.int64),
        "token_type_ids": np.zeros((1, num_tokens), np.int64),
        "seqlens_k": np.array([num_tokens - 1], np.int32),
        "total_sequence_length": np.array(num_tokens, np.int32),
        "logits_index": np.array([num_tokens - 1], np.int64),
        "adapter_ids": np.zeros(1, np.int64),
    }
    inputs = {}
    for node in session.get_inputs():
        if node.name.startswith("past_key_values."):
            _, num_kv_heads, _, head_size = node.shape
            inputs[node.name] = np.zeros((1, num_kv_heads, num_tokens, head_size), np.float32)
        elif node.name.startswith("lora."):  # no adapter
            inputs[node.name] = np.zeros([size if isinstance(size, int) else 1 for size in node.shape], np.float32)
        elif node.name in known:
            inputs[node.name] = known[node.name]
        else:
            raise InvalidConfig(
                f"calibration is given for a graph with input {node.name!r}, which a text alone does not determine; "
                "expected a decoder without cross attention or an encoder: export without calibration"
            )
    return inputs
