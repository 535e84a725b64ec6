"""The decoder graph: equal to PyTorch token for token, in the shape the engine expects, the model left untouched."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from exporters.decoder import measure
from exporters.errors import UnsupportedArchitecture
from exporters.masks import Pattern, classify
from exporters.norms import fused_norms
from exporters.reference_loop import GraphLoop, export_graph, generate
from tests.integration.exporters.conftest import VOCAB_SIZE, make_model

pytestmark = pytest.mark.integration

EXPORTED = ["llama_tied_biased", "mistral_window", "gpt2"]
NUM_NEW_TOKENS = 12


@pytest.mark.parametrize("name", EXPORTED)
def test_greedy_tokens_equal_generate_in_chunks_and_beside_other_rows(name: str, tmp_path: Path) -> None:
    model = make_model(name)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist() for length in (19, 3, 1)]
    expected = [generate(model, prompt, NUM_NEW_TOKENS) for prompt in prompts]

    loop = GraphLoop(export_graph(model, tmp_path), num_rows=4, max_len=48)
    found = loop.greedy(prompts, chunks=[(9, 4, 6), (3,), (1,)], num_new=NUM_NEW_TOKENS)

    assert found == expected
    assert generate(model, prompts[0], NUM_NEW_TOKENS) == expected[0], "tracing must leave the model as it was"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    model = make_model("llama")
    return model, export_graph(model, tmp_path_factory.mktemp("llama"))


def test_graph_has_the_contract_s_tensors(llama: tuple[Any, Path]) -> None:
    graph = onnx.load(str(llama[1]), load_external_data=False).graph

    def describe(value: onnx.ValueInfoProto) -> tuple[int, tuple[Any, ...]]:
        tensor = value.type.tensor_type
        return tensor.elem_type, tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)

    kv = (onnx.TensorProto.FLOAT, ("batch", 2, "max_len", 16))
    names = [f"{layer}.{part}" for layer in range(2) for part in ("key", "value")]
    assert {value.name: describe(value) for value in graph.input} == {
        "input_ids": (onnx.TensorProto.INT64, ("batch", "sequence")),
        "position_ids": (onnx.TensorProto.INT64, ("batch", "sequence")),
        "seqlens_k": (onnx.TensorProto.INT32, ("batch",)),
        "total_sequence_length": (onnx.TensorProto.INT32, ()),
        "logits_index": (onnx.TensorProto.INT64, ("positions",)),
        **{f"past_key_values.{name}": kv for name in names},
    }
    assert {value.name: describe(value) for value in graph.output} == {
        "logits": (onnx.TensorProto.FLOAT, ("positions", VOCAB_SIZE)),
        "top_logits": (onnx.TensorProto.FLOAT, ("positions", 64)),
        "top_ids": (onnx.TensorProto.INT64, ("positions", 64)),
        **{f"present.{name}": kv for name in names},
    }


def test_graph_has_one_attention_node_a_layer_and_one_node_a_norm(llama: tuple[Any, Path]) -> None:
    nodes = Counter(node.op_type for node in onnx.load(str(llama[1]), load_external_data=False).graph.node)
    assert nodes["GroupQueryAttention"] == 2
    assert nodes["SimplifiedLayerNormalization"] == 1
    assert nodes["SkipSimplifiedLayerNormalization"] == 4
    assert nodes["TopK"] == 1


def test_graph_names_nodes_after_modules_and_keeps_no_path_of_this_machine(llama: tuple[Any, Path]) -> None:
    graph = onnx.load(str(llama[1]), load_external_data=False).graph
    names = [node.name for node in graph.node]
    assert "/model/layers.0/self_attn/qkv_proj/MatMul" in names
    assert len(set(names)) == len(names)
    assert "model.layers.1.mlp.up_proj.weight_transposed" in {weight.name for weight in graph.initializer}
    assert b".py" not in llama[1].read_bytes()


def test_logits_are_those_of_the_asked_positions(llama: tuple[Any, Path]) -> None:
    model, path = llama
    ids = np.arange(14).reshape(2, 7) + 20
    with torch.no_grad():
        expected = model(input_ids=torch.tensor(ids)).logits.numpy()
    loop = GraphLoop(path, num_rows=2, max_len=16)
    result = loop.run(0, ids, [0, 0], logits_index=[2, 13, 8])
    np.testing.assert_allclose(result["logits"][0], expected[0, 2], atol=1e-4)
    np.testing.assert_allclose(result["logits"][1], expected[1, 6], atol=1e-4)
    np.testing.assert_allclose(result["logits"][2], expected[1, 1], atol=1e-4)
    np.testing.assert_array_equal(result["top_logits"], -np.sort(-result["logits"], axis=-1)[:, :64])
    np.testing.assert_array_equal(np.take_along_axis(result["logits"], result["top_ids"], -1), result["top_logits"])


def test_heads_of_a_size_that_the_operator_cannot_take_are_filled_up(tmp_path: Path) -> None:
    model = make_model("llama", head_dim=12, num_hidden_layers=1)
    assert measure(model).layers[0].head_size == 16
    prompt = list(range(30, 48))
    loop = GraphLoop(export_graph(model, tmp_path), num_rows=1, max_len=48)
    assert loop.greedy([prompt], [(10, 8)], NUM_NEW_TOKENS) == [generate(model, prompt, NUM_NEW_TOKENS)]


@pytest.mark.parametrize(
    ("seen", "pattern"),
    [
        (lambda q, k: k <= q, Pattern()),
        (lambda q, k: (k <= q) & (k > q - 24), Pattern(window=24)),
        (lambda q, k: (k <= q) & (k // 24 == q // 24), Pattern(chunk=24)),
        (lambda q, k: (k <= q) & (k > q - 4000), Pattern()),
    ],
)
def test_masks_are_known_by_what_they_show(seen: Callable[..., torch.Tensor], pattern: Pattern) -> None:
    assert classify(lambda row, head, q, k: seen(q, k), 1000, "layer") == pattern


@pytest.mark.parametrize(
    "seen",
    [lambda q, k: k <= q + 1, lambda q, k: (k <= q) & (k % 2 == 0), lambda q, k: (k <= q) & (k > q - 9 - q // 99)],
)
def test_a_mask_of_no_known_pattern_is_refused(seen: Callable[..., torch.Tensor]) -> None:
    with pytest.raises(UnsupportedArchitecture, match="neither causal nor a window nor in chunks"):
        classify(lambda row, head, q, k: seen(q, k), 1000, "layer")


def test_a_model_whose_tokens_meet_outside_of_attention_is_refused() -> None:
    model = make_model("llama")
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, result: result.cumsum(1))
    with pytest.raises(UnsupportedArchitecture, match="LlamaForCausalLM lets tokens see each other"):
        measure(model)


def test_a_model_that_does_more_than_the_attention_node_is_refused() -> None:
    model = make_model("llama")
    model.set_attn_implementation("eager")
    measure(model)
    modeling = importlib.import_module(type(model).__module__)
    original = modeling.eager_attention_forward
    try:
        modeling.eager_attention_forward = lambda *args, **kwargs: (original(*args, **kwargs)[0] * 1.5, None)
        with pytest.raises(UnsupportedArchitecture, match="does more in its attention"):
            measure(model)
    finally:
        modeling.eager_attention_forward = original


def test_only_modules_that_compute_an_rms_norm_are_fused() -> None:
    with fused_norms(make_model("llama")) as num_llama, fused_norms(make_model("gemma2")) as num_gemma:
        assert (num_llama, num_gemma) == (5, 9)
    with fused_norms(make_model("gpt2")) as num_gpt2:
        assert num_gpt2 == 0


def test_longrope_is_exact_up_to_its_short_length(tmp_path: Path) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
        "original_max_position_embeddings": 32,
    }
    model = make_model("phi3", rope_parameters=rope, num_hidden_layers=1)
    prompt = list(range(30, 48))
    expected = generate(model, prompt, NUM_NEW_TOKENS)
    loop = GraphLoop(export_graph(model, tmp_path), num_rows=1, max_len=32)
    assert loop.greedy([prompt], chunks=[(10, 8)], num_new=NUM_NEW_TOKENS) == [expected]
