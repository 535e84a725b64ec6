"""Quantized graphs: close to the float graph, as small as promised, and equal to themselves to the bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NotImplementedByRuntime

from exporters.config import ExportConfig
from exporters.decoder import measure, trace
from exporters.errors import InvalidConfig
from exporters.fusions import fuse
from exporters.graph import save_graph
from exporters.quantization import QuantizationReport, cache_type, quantize
from exporters.quantization.smoothing import read_calibration, smooth
from exporters.reference_loop import MAX_POSITIONS, GraphLoop
from tests.integration.exporters.conftest import VOCAB_SIZE, make_model

pytestmark = pytest.mark.integration

SIZES: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 1},
    "llama_tied_biased": {"num_hidden_layers": 1},
    "gpt2": {"n_layer": 1},
    "gemma2": {"num_hidden_layers": 1},
}
NUM_TOKENS = 24

Quantize = Callable[..., tuple[Path, QuantizationReport]]


def settings(precision: str, device: str = "cpu", **changes: Any) -> ExportConfig:
    return ExportConfig("checkpoint", Path("out"), precision=precision, device=device, **changes)


class Traced:
    """One tiny model, traced and fused once; every quantization starts from a copy of that graph."""

    def __init__(self, name: str, folder: Path, prepare: Callable[[Any], None] | None = None) -> None:
        model = make_model(name, **SIZES[name])
        generator = torch.Generator().manual_seed(0)
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.5, generator=generator)
            elif parameter.dim() == 1:
                torch.nn.init.uniform_(parameter, 0.5, 1.5, generator=generator)
        if prepare is not None:
            prepare(model)
        self.program = trace(model, measure(model).layers, 64)
        fuse(self.program.model, MAX_POSITIONS)
        self.graph = self.program.model
        self.folder = folder
        self.num_float_bytes = 4 * sum(parameter.numel() for parameter in model.parameters())

    def write(
        self, config: ExportConfig, calibration: Sequence[np.ndarray] | None = None
    ) -> tuple[Path, QuantizationReport]:
        self.program.model = self.graph.clone()
        report = quantize(self.program.model, config, calibration)
        folder = self.folder / f"{len(list(self.folder.iterdir()))}"
        folder.mkdir()
        save_graph(self.program, folder / "model.onnx")
        return folder / "model.onnx", report


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Traced]:
    made: dict[str, Traced] = {}

    def make(name: str) -> Traced:
        if name not in made:
            made[name] = Traced(name, tmp_path_factory.mktemp(name))
        return made[name]

    return make


def random_ids(num_rows: int = 2, num_tokens: int = NUM_TOKENS, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, VOCAB_SIZE, (num_rows, num_tokens))


def logits_of(path: Path, ids: np.ndarray) -> np.ndarray:
    """Logits (B, V) of the last of ``ids`` (B, S), in a cache of the graph's own type."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    num_rows, num_tokens = ids.shape
    inputs = {
        "input_ids": ids,
        "position_ids": np.tile(np.arange(num_tokens), (num_rows, 1)),
        "seqlens_k": np.full(num_rows, num_tokens - 1, np.int32),
        "total_sequence_length": np.array(num_tokens, np.int32),
        "logits_index": np.arange(1, num_rows + 1) * num_tokens - 1,
    }
    for node in session.get_inputs():
        if node.name.startswith("past_key_values."):
            dtype = np.float16 if node.type == "tensor(float16)" else np.float32
            inputs[node.name] = np.zeros((num_rows, node.shape[1], num_tokens, node.shape[3]), dtype)
    logits = session.run(["logits"], inputs)[0]
    assert logits.dtype == np.float32
    return logits


def error_of(path: Path, reference: Path, ids: np.ndarray | None = None) -> float:
    """Root mean square of the difference of the logits, as a part of their standard deviation."""
    ids = random_ids() if ids is None else ids
    expected = logits_of(reference, ids)
    return float((logits_of(path, ids) - expected).std() / expected.std())


def operators(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(str(path), load_external_data=False).graph.node]


def data_bytes(path: Path) -> int:
    return path.with_name("model.onnx.data").stat().st_size


# The bounds are half as much again as what was seen. 4 bits of random weights are coarse; those of trained models are
# for the certificate to judge.
@pytest.mark.parametrize(
    ("precision", "device", "bound"),
    [
        ("int8", "cpu", 0.06),
        ("int4", "cpu", 0.4),
        ("fp16", "cpu", 0.003),
        ("int8", "cuda", 0.06),
        ("int4", "cuda", 0.4),
    ],
)
@pytest.mark.parametrize("name", SIZES)
def test_logits_stay_close_to_those_of_the_float_graph(
    name: str, precision: str, device: str, bound: float, traced: Callable[[str], Traced]
) -> None:
    model = traced(name)
    reference, _ = model.write(settings("fp32"))
    path, report = model.write(settings(precision, device))
    error = error_of(path, reference)
    assert 0 < error < bound
    assert data_bytes(path) < data_bytes(reference)
    assert report.precision == precision
    assert report.weight_bytes_after < report.weight_bytes_before
    is_integer = precision.startswith("int")
    assert report.num_quantized == (operators(reference).count("MatMul") if is_integer else 0)
    assert ("MatMul" in operators(path)) != is_integer
    assert cache_types(path) == {cache_type(precision, device)}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_fp16_chooses_the_tokens_of_the_float_graph(name: str, traced: Callable[[str], Traced]) -> None:
    model = traced(name)
    prompts = [random_ids(1, length, seed=2)[0].tolist() for length in (17, 4)]
    tokens = [
        GraphLoop(model.write(settings(precision))[0], num_rows=2, max_len=48).greedy(prompts, [(9, 8), (4,)], 12)
        for precision in ("fp32", "fp16")
    ]
    assert tokens[0] == tokens[1]


def cache_types(path: Path) -> set[str]:
    names = {onnx.TensorProto.FLOAT: "fp32", onnx.TensorProto.FLOAT16: "fp16", onnx.TensorProto.BFLOAT16: "bf16"}
    graph = onnx.load(str(path), load_external_data=False).graph
    return {
        names[value.type.tensor_type.elem_type]
        for value in (*graph.input, *graph.output)
        if value.name.startswith(("past_key_values.", "present."))
    }


# int4 with blocks of 16 or 32 and products in int8; ONNX Runtime's other kernels for it do not keep this promise.
@pytest.mark.parametrize(("precision", "block_size"), [("int8", 32), ("int4", 32), ("int4", 16)])
@pytest.mark.parametrize("name", SIZES)
def test_a_row_s_logits_do_not_depend_on_other_rows_nor_on_chunks_to_the_bit(
    name: str, precision: str, block_size: int, traced: Callable[[str], Traced]
) -> None:
    path, _ = traced(name).write(settings(precision, block_size=block_size))
    loop = GraphLoop(path, num_rows=8, max_len=48)
    lengths = [21, 5, 33, 9, 2, 14, 28, 3]
    for row, length in enumerate(lengths):
        loop.prefill(row, random_ids(1, length, seed=row)[0].tolist(), [length])
    ids = random_ids(8, 1)
    alone = [loop.run(row, ids[row : row + 1], [lengths[row]])["logits"][0] for row in range(8)]
    together = loop.run(0, ids, lengths)["logits"]
    for row in range(8):
        np.testing.assert_array_equal(together[row], alone[row])

    prompt = random_ids(1, 40)
    found = []
    for chunks in [(40,), (20, 20), (2, 38), (16, 16, 8), (3, 2, 5, 30)]:
        done = 0
        for size in chunks:
            logits = loop.run(0, prompt[:, done : done + size], [done])["logits"]
            done += size
        found.append((logits, loop.run(0, ids[:1], [40])["logits"]))
    for prefilled, decoded in found[1:]:
        np.testing.assert_array_equal(prefilled, found[0][0])
        np.testing.assert_array_equal(decoded, found[0][1])


def test_a_tied_head_and_its_table_are_stored_once(traced: Callable[[str], Traced]) -> None:
    tied, untied = traced("llama_tied_biased"), traced("llama")
    for model, num_tables in ((tied, 1), (untied, 2)):
        path, report = model.write(settings("int8"))
        assert report.num_tables == 1
        graph = onnx.load(str(path), load_external_data=False).graph
        in_8_bits = [
            tuple(weight.dims)
            for weight in graph.initializer
            if weight.data_type == onnx.TensorProto.INT8 and VOCAB_SIZE in weight.dims
        ]
        assert len(in_8_bits) == num_tables
        # A byte for a weight; scales, norms and angles are what there is besides.
        assert data_bytes(path) < model.num_float_bytes / 4 * 1.25
    path, _ = tied.write(settings("int8", "cuda"))
    graph = onnx.load(str(path), load_external_data=False).graph
    (head,) = [node for node in graph.node if node.op_type == "MatMulNBits" and VOCAB_SIZE in attributes(node)]
    (table,) = [node for node in graph.node if node.op_type == "GatherBlockQuantized"]
    (reshape,) = [node for node in graph.node if table.input[0] in node.output]
    assert reshape.input[0] == head.input[1]
    assert table.input[2] == head.input[2]


def attributes(node: onnx.NodeProto) -> list[Any]:
    return [onnx.helper.get_attribute_value(a) for a in node.attribute]


def test_int8_adds_four_nodes_a_value_and_none_a_product(traced: Callable[[str], Traced]) -> None:
    path, report = traced("llama").write(settings("int8"))
    found = operators(path)
    assert found.count("MatMulIntegerToFloat") == report.num_quantized == 6
    # qkv, attention output, gate and up, down, head
    assert [found.count(name) for name in ("Abs", "ReduceMax", "Div", "QuantizeLinear")] == [5] * 4


@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
def test_int4_takes_its_options(block_size: int, traced: Callable[[str], Traced]) -> None:
    model = traced("llama")
    path, _ = model.write(settings("int4", block_size=block_size, accuracy_level=0))
    nodes = [node for node in onnx.load(str(path)).graph.node if node.op_type == "MatMulNBits"]
    assert len(nodes) == 5, "all but the head, which has 8 bits"
    for node in nodes:
        named = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert (named["bits"], named["block_size"], named["accuracy_level"]) == (4, block_size, 0)
    # Blocks wider than the matrix are padded.
    assert error_of(path, model.write(settings("fp32"))[0]) < 0.5


def test_smoothing_takes_the_error_of_outlying_activations_away(tmp_path: Path) -> None:
    factor, channels = 60.0, [3, 17]

    def plant(model: Any) -> None:
        """Outliers that change nothing: some features are much larger, and what reads them smaller by as much."""
        with torch.no_grad():
            for layer in model.model.layers:
                attention, mlp = layer.self_attn, layer.mlp
                for norm, readers in (
                    (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                    (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
                ):
                    norm.weight[channels] *= factor
                    for reader in readers:
                        reader.weight[:, channels] /= factor
                mlp.up_proj.weight[channels] *= factor
                mlp.down_proj.weight[:, channels] /= factor

    model = Traced("llama", tmp_path, plant)
    reference, _ = model.write(settings("fp32"))
    plain, _ = model.write(settings("int8"))
    smoothed, report = model.write(settings("int8"), [random_ids(1, length, seed=9)[0] for length in (48, 20)])
    assert report.num_smoothed == 3
    assert operators(smoothed) == operators(plain)
    assert data_bytes(smoothed) <= data_bytes(plain) + 4096, "norms that shared their weights have their own"
    assert error_of(smoothed, reference) < error_of(plain, reference) / 4


def test_smoothing_leaves_the_float_graph_s_results_as_they_are(
    tmp_path: Path, traced: Callable[[str], Traced]
) -> None:
    model = traced("gpt2")
    reference, _ = model.write(settings("fp32"))
    changed = model.graph.clone()
    assert smooth(changed, [random_ids(1)[0]]) == 2
    ir.save(changed, tmp_path / "model.onnx")
    found, expected = (logits_of(path, random_ids()) for path in (tmp_path / "model.onnx", reference))
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_bf16_is_the_same_graph_as_fp16_in_another_type(traced: Callable[[str], Traced]) -> None:
    for name in SIZES:
        half, _ = traced(name).write(settings("fp16", "cuda"))
        brain, _ = traced(name).write(settings("bf16", "cuda"))
        assert operators(half) == operators(brain)
        assert cache_types(brain) == {"bf16"}
        # ONNX Runtime checks the types of all nodes before it looks for their kernels, of which the CPU has none.
        with pytest.raises(NotImplementedByRuntime, match="Could not find an implementation"):
            ort.InferenceSession(str(brain), providers=["CPUExecutionProvider"])


def test_bf16_is_close_where_every_value_is_rounded_to_it(traced: Callable[[str], Traced], tmp_path: Path) -> None:
    for name in SIZES:
        model = traced(name)
        reference, _ = model.write(settings("fp32"))
        rounding = model.graph.clone()
        quantize(rounding, settings("bf16", "cuda"))
        emulate_bf16(rounding.graph)
        path = tmp_path / f"{name}.onnx"
        ir.save(rounding, path)
        expected, ids = logits_of(reference, random_ids()), random_ids()
        assert 0 < (logits_of(path, ids) - expected).std() / expected.std() < 0.05


def emulate_bf16(graph: ir.Graph) -> None:
    """The same graph for kernels of float32: constants, and what nodes give, hold numbers that bf16 can hold."""
    float32 = ir.TensorType(ir.DataType.FLOAT)
    for value in (*graph.inputs, *graph.initializers.values()):
        if value.dtype == ir.DataType.BFLOAT16:
            if value.const_value is not None:
                value.const_value = ir.Tensor(value.const_value.numpy().astype(np.float32), name=value.name)
            value.type = float32
    for node in list(graph):
        for output in node.outputs:
            if output.dtype != ir.DataType.BFLOAT16:
                continue
            if node.op_type != "Cast":
                output.type = float32
            if output.is_graph_output() or not output.uses():
                continue
            rounded = ir.node("Cast", [output], {"to": ir.DataType.BFLOAT16})
            back = ir.node("Cast", [rounded.outputs[0]], {"to": ir.DataType.FLOAT})
            back.outputs[0].type, back.outputs[0].shape = float32, output.shape
            output.replace_all_uses_with(back.outputs[0])
            rounded.replace_input_with(0, output)
            node.append([rounded, back])


@pytest.mark.parametrize(("precision", "device"), [("bf16", "cpu"), ("fp32", "cuda")])
def test_what_has_no_kernel_is_refused(precision: str, device: str) -> None:
    with pytest.raises(InvalidConfig, match=f"precision has value '{precision}'"):
        settings(precision, device)


def test_calibration_is_refused_where_activations_are_not_quantized(traced: Callable[[str], Traced]) -> None:
    with pytest.raises(InvalidConfig, match="calibration"):
        settings("int4", calibration=Path("text"))
    with pytest.raises(InvalidConfig, match="calibration"):
        quantize(traced("llama").graph.clone(), settings("fp16"), [random_ids(1)[0]])


def test_a_calibration_text_is_cut_into_pieces(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("a" * 70)
    pieces = read_calibration(path, lambda text: [ord(letter) for letter in text], 32)
    assert [len(piece) for piece in pieces] == [32, 32, 6]
    assert np.concatenate(pieces).tolist() == [ord("a")] * 70
    path.write_text("")
    for wrong in (path, tmp_path / "missing"):
        with pytest.raises(InvalidConfig, match="calibration has value"):
            read_calibration(wrong, lambda text: list(text.encode()), 32)
