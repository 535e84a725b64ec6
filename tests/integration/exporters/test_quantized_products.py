"""The quantization pass on graphs made by hand: products of every form, inputs, stacks, zeros, and an encoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from transformers import BertConfig, BertModel

from exporters.fusions import fuse
from exporters.quantization import quantize
from exporters.quantization.w8a8 import quantize_matrix
from exporters.reference_loop import MAX_POSITIONS
from tests.integration.exporters.conftest import VOCAB_SIZE
from tests.integration.exporters.test_quantization import random_ids, settings

pytestmark = pytest.mark.integration


def graph_of(nodes: list[onnx.NodeProto], shape: Sequence[Any], **weights: np.ndarray) -> ir.Model:
    graph = onnx.helper.make_graph(
        nodes,
        "graph",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def run(model: ir.Model, x: np.ndarray) -> np.ndarray:
    return ort.InferenceSession(ir.to_proto(model).SerializeToString()).run(None, {"x": x})[0]


@pytest.mark.parametrize("is_turned", [False, True])
def test_a_product_written_with_its_bias_is_quantized_too(is_turned: bool) -> None:
    generator = np.random.default_rng(0)
    weight = generator.normal(size=(16, 32) if is_turned else (32, 16)).astype(np.float32)
    bias = generator.normal(size=16).astype(np.float32) * 20
    node = onnx.helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=int(is_turned))
    x = generator.normal(size=(3, 32)).astype(np.float32) * np.array([[1], [1e-3], [50]], np.float32)
    expected = x @ (weight.T if is_turned else weight) + bias
    for precision, atol in (("int8", 0.02), ("int4", 0.2)):
        model = graph_of([node], ["B", 32], w=weight, b=bias)
        assert quantize(model, settings(precision)).num_quantized == 1
        scale = np.abs(x).max(axis=1, keepdims=True)
        np.testing.assert_allclose(run(model, x) / scale, expected / scale, atol=atol * 16)


def test_products_of_products_are_quantized() -> None:
    generator = np.random.default_rng(0)
    first, second = (generator.normal(size=shape).astype(np.float32) for shape in ((64, 32), (32, 48)))
    nodes = [onnx.helper.make_node("MatMul", *names) for names in ((["x", "v"], ["z"]), (["z", "w"], ["y"]))]
    x = generator.normal(size=(3, 64)).astype(np.float32)
    expected = x @ first @ second
    for precision, bound in (("int8", 0.03), ("int4", 0.2)):
        model = graph_of(nodes, ["B", 64], v=first, w=second)
        assert quantize(model, settings(precision)).num_quantized == 2
        assert (run(model, x) - expected).std() / expected.std() < bound


def test_inputs_that_are_not_the_cache_s_keep_their_types() -> None:
    """An adapter's matrices beside a product with a constant one."""
    float32, int64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
    generator = np.random.default_rng(0)
    table, weight = (generator.normal(size=shape).astype(np.float32) for shape in ((50, 16), (16, 8)))
    node = onnx.helper.make_node
    graph = onnx.helper.make_graph(
        [
            node("Gather", ["table", "input_ids"], ["x"]),
            node("MatMul", ["x", "w"], ["plain"]),
            node("Gather", ["lora.q.a", "adapter_ids"], ["a"]),
            node("Gather", ["lora.q.b", "adapter_ids"], ["b"]),
            node("MatMul", ["x", "a"], ["low"]),
            node("MatMul", ["low", "b"], ["change"]),
            node("Add", ["plain", "change"], ["logits"]),
        ],
        "graph",
        [
            onnx.helper.make_tensor_value_info("input_ids", int64, ["B", "S"]),
            onnx.helper.make_tensor_value_info("adapter_ids", int64, ["B"]),
            onnx.helper.make_tensor_value_info("lora.q.a", float32, [3, 16, 4]),
            onnx.helper.make_tensor_value_info("lora.q.b", float32, [3, 4, 8]),
        ],
        [onnx.helper.make_tensor_value_info("logits", float32, ["B", "S", 8])],
        [onnx.numpy_helper.from_array(table, "table"), onnx.numpy_helper.from_array(weight, "w")],
    )
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    inputs = {
        "input_ids": np.array([[1, 2, 3], [4, 5, 6]]),
        "adapter_ids": np.array([2, 0]),
        "lora.q.a": generator.normal(size=(3, 16, 4)).astype(np.float32),
        "lora.q.b": generator.normal(size=(3, 4, 8)).astype(np.float32),
    }
    x = table[inputs["input_ids"]]
    adapters = [inputs[name][inputs["adapter_ids"]] for name in ("lora.q.a", "lora.q.b")]
    expected = x @ weight + x @ adapters[0] @ adapters[1]
    for precision, device in (("int8", "cpu"), ("int4", "cpu"), ("fp16", "cuda"), ("int8", "cuda")):
        model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
        report = quantize(model, settings(precision, device, block_size=16))
        assert report.num_quantized == (1 if precision != "fp16" else 0)
        (logits,) = ort.InferenceSession(ir.to_proto(model).SerializeToString()).run(None, inputs)
        assert logits.dtype == np.float32
        assert (logits - expected).std() / expected.std() < 0.1


def test_an_encoder_is_quantized_like_a_decoder(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 128}
    torch.manual_seed(0)
    bert = BertModel(BertConfig(vocab_size=VOCAB_SIZE, hidden_size=64, **sizes), add_pooling_layer=True).eval()
    bert.set_attn_implementation("eager")
    for parameter in bert.parameters():
        torch.nn.init.normal_(parameter, mean=0.0 if parameter.dim() > 1 else 0.5, std=0.2)
    batch, tokens = torch.export.Dim.DYNAMIC, torch.export.Dim.DYNAMIC
    ids, mask = torch.from_numpy(random_ids(2, 9)), torch.ones(2, 9, dtype=torch.int64)
    mask[1, 6:] = 0
    program = torch.onnx.export(
        bert,
        kwargs={"input_ids": ids, "attention_mask": mask},
        dynamic_shapes={"input_ids": {0: batch, 1: tokens}, "attention_mask": {0: batch, 1: tokens}},
        input_names=["input_ids", "attention_mask"],
        output_names=["hidden", "pooled"],
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    fuse(program.model, MAX_POSITIONS)

    def encode(model: ir.Model, rows: slice = slice(None)) -> list[np.ndarray]:
        session = ort.InferenceSession(ir.to_proto(model).SerializeToString())
        return session.run(None, {"input_ids": ids[rows].numpy(), "attention_mask": mask[rows].numpy()})

    expected = encode(program.model.clone())
    for precision, device, bound in (("int8", "cpu", 0.03), ("int4", "cpu", 0.2), ("fp16", "cpu", 0.003)):
        model = program.model.clone()
        quantize(model, settings(precision, device))
        assert {"MatMul", "Gemm"}.isdisjoint(node.op_type for node in model.graph if is_weighted(node)) == (
            precision != "fp16"
        )
        for found, wanted in zip(encode(model), expected, strict=True):
            assert found.dtype == np.float32
            assert (found - wanted)[0].std() / wanted.std() < bound
        if precision != "fp16":
            np.testing.assert_array_equal(encode(model, slice(1))[0], encode(model)[0][:1])


def is_weighted(node: ir.Node) -> bool:
    return any(value is not None and value.is_initializer() and len(value.shape or ()) == 2 for value in node.inputs)


def test_stacks_of_matrices_stay_float() -> None:
    stack = np.random.default_rng(0).normal(size=(3, 32, 16)).astype(np.float32)
    for precision in ("int8", "int4"):
        model = graph_of([onnx.helper.make_node("MatMul", ["x", "w"], ["y"])], ["B", 3, 5, 32], w=stack)
        report = quantize(model, settings(precision))
        assert report.num_quantized == 0
        assert report.weight_bytes_after == report.weight_bytes_before == stack.nbytes


def test_rows_of_zeros_and_columns_of_zeros_give_zeros() -> None:
    weight = np.random.default_rng(0).normal(size=(32, 16)).astype(np.float32)
    weight[:, 5] = 0
    model = graph_of([onnx.helper.make_node("MatMul", ["x", "w"], ["y"])], ["B", 32], w=weight)
    assert quantize(model, settings("int8")).num_quantized == 1
    x = np.random.default_rng(1).normal(size=(3, 32)).astype(np.float32)
    x[1] = 0
    y = run(model, x)
    np.testing.assert_array_equal(y[1], 0)
    np.testing.assert_array_equal(y[:, 5], 0)
    np.testing.assert_allclose(y, x @ weight, atol=0.1)


def test_a_weight_is_off_by_half_a_step_at_most() -> None:
    weight = np.random.default_rng(0).normal(size=(5000, 24)).astype(np.float32)
    for axis in (0, 1):
        rounded, scales = quantize_matrix(weight, axis)
        steps = scales[:, None] if axis else scales
        assert np.abs(rounded * steps - weight).max() <= steps.max() / 2 * 1.001
        assert np.abs(rounded).max() == 127
