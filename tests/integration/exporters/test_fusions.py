"""Fused graphs: as few nodes as promised, equal to the model and the traced graph, and to themselves to the bit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from exporters.reference_loop import MAX_POSITIONS, GraphLoop, export_graph, export_with_size, generate
from tests.integration.exporters.conftest import LLAMA_SIZES, VOCAB_SIZE, make_model

pytestmark = pytest.mark.integration

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "attention_factor": 1.3,
    "original_max_position_embeddings": 64,
}

# name → (changes, nodes of a layer, is packed, is rotary inside the attention node)
CASES: dict[str, tuple[str, dict[str, Any], int, bool, bool]] = {
    "llama": ("llama", {}, 11, True, True),
    "llama3_scaled_rope": ("llama", {"rope_parameters": LLAMA3_ROPE}, 11, True, True),
    "yarn_attention_factor": ("llama", {"rope_parameters": YARN_ROPE}, 11, True, True),
    "biases": ("qwen2", {}, 12, True, True),
    "window": ("mistral_window", {}, 11, True, True),
    "packed_by_the_model": ("phi3", {}, 10, True, True),
    "norms_of_queries_and_keys": ("qwen3", {}, 19, False, True),
    "softcap_and_four_norms": ("gemma2", {}, 12, True, True),
    "norms_behind_transposes": ("gemma3", {}, 20, False, True),
    "interleaved": ("cohere", {}, 20, True, True),
    "partial_and_mixed_by_head": ("gpt_neox", {"hidden_size": 128, "num_attention_heads": 2}, 11, True, True),
    "too_narrow_for_the_node": ("gpt_neox", {}, 41, False, False),
    "no_rotary": ("gpt2", {}, 15, True, False),
    "scaled_queries": ("opt", {}, 15, True, False),
}


def attention_nodes(path: Path) -> list[tuple[dict[str, Any], Sequence[str]]]:
    graph = onnx.load(str(path), load_external_data=False).graph
    return [
        ({a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}, node.input)
        for node in graph.node
        if node.op_type == "GroupQueryAttention"
    ]


@pytest.mark.parametrize("case", CASES)
def test_layers_are_fused_as_far_as_their_operators_allow_and_stay_equal(case: str, tmp_path: Path) -> None:
    name, changes, num_nodes, is_packed, has_rotary = CASES[case]
    model = make_model(name, **changes)
    generator = np.random.default_rng(1)
    prompts = [generator.integers(3, VOCAB_SIZE, length).tolist() for length in (17, 4)]
    expected = [generate(model, prompt, 12) for prompt in prompts]

    path, size = export_with_size(model, tmp_path)
    loop = GraphLoop(path, num_rows=3, max_len=48)
    assert loop.greedy(prompts, chunks=[(9, 8), (4,)], num_new=12) == expected
    for attributes, inputs in attention_nodes(path):
        assert (inputs[1] == "") == is_packed
        assert attributes.get("do_rotary", 0) == has_rotary
        assert attributes.get("rotary_interleaved", 0) == (case == "interleaved")
    assert size.num_nodes_per_layer == num_nodes


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    model = make_model("llama")
    return model, export_graph(model, tmp_path_factory.mktemp("fused"))


def test_fused_and_traced_graph_have_the_same_inputs_outputs_and_logits(
    llama: tuple[Any, Path], tmp_path: Path
) -> None:
    model, fused = llama
    traced = export_graph(model, tmp_path, fused=False)
    sessions = [ort.InferenceSession(str(path)) for path in (fused, traced)]
    contracts = [
        [(value.name, value.type, value.shape) for value in (*session.get_inputs(), *session.get_outputs())]
        for session in sessions
    ]
    assert contracts[0] == contracts[1]
    assert "position_ids" in {name for name, _, _ in contracts[0]}, "kept, though the attention node no longer reads it"

    ids = np.arange(30).reshape(2, 15) + 20
    loops = [GraphLoop(path, num_rows=2, max_len=32) for path in (fused, traced)]
    found, expected = (loop.run(0, ids, [0, 0])["logits"] for loop in loops)
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_angles_reach_the_longest_sequence(llama: tuple[Any, Path]) -> None:
    model, path = llama
    prompt = np.random.default_rng(2).integers(3, VOCAB_SIZE, MAX_POSITIONS - 4).tolist()
    loop = GraphLoop(path, num_rows=1, max_len=MAX_POSITIONS)
    assert loop.greedy([prompt], [(len(prompt),)], num_new=5) == [generate(model, prompt, 5)]


def test_angles_are_stored_once(llama: tuple[Any, Path]) -> None:
    weights = [weight.name for weight in onnx.load(str(llama[1]), load_external_data=False).graph.initializer]
    assert Counter(name for name in weights if name.startswith("rotary.")) == Counter(
        ("rotary.cos_cache", "rotary.sin_cache")
    )


def test_layers_with_angles_of_their_own_keep_them(tmp_path: Path) -> None:
    # Gemma 3: local layers turn with another base than global ones.
    model = make_model("gemma3", layer_types=["sliding_attention", "full_attention"])
    angles = [inputs[7] for _, inputs in attention_nodes(export_graph(model, tmp_path))]
    assert len(set(angles)) == 2


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "mixtral"])
def test_a_row_s_logits_do_not_depend_on_other_rows_to_the_bit(name: str, tmp_path: Path) -> None:
    loop = GraphLoop(export_graph(make_model(name), tmp_path), num_rows=8, max_len=48)
    generator = np.random.default_rng(3)
    lengths = [21, 5, 33, 9, 2, 14, 28, 3]
    for row, length in enumerate(lengths):
        prompt = generator.integers(3, VOCAB_SIZE, length).tolist()
        loop.prefill(row, prompt, [length])
    ids = generator.integers(3, VOCAB_SIZE, (8, 1))
    alone = [loop.run(row, ids[row : row + 1], [lengths[row]])["logits"][0] for row in range(8)]
    together = loop.run(0, ids, lengths)["logits"]
    for row in range(8):
        np.testing.assert_array_equal(together[row], alone[row])
    # Rows 1 and 4 idle: length 1 after the step, position 0, whatever token.
    idle = [0 if row in (1, 4) else length for row, length in enumerate(lengths)]
    beside_idle = loop.run(0, ids, idle)["logits"]
    for row in set(range(8)) - {1, 4}:
        np.testing.assert_array_equal(beside_idle[row], alone[row])


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "mixtral"])
def test_logits_do_not_depend_on_the_chunks_of_a_prompt_to_the_bit(name: str, tmp_path: Path) -> None:
    loop = GraphLoop(export_graph(make_model(name), tmp_path), num_rows=1, max_len=48)
    prompt = np.random.default_rng(4).integers(3, VOCAB_SIZE, 40)
    token = np.array([[7]])
    found = []
    # The operator takes queries in blocks, of 32 and more, and the last of a block that is alone another way; that
    # changes its last bits, fused or not, so no chunk here has 33 tokens.
    for chunks in [(40,), (20, 20), (2, 38), (35, 5), (16, 16, 8), (3, 2, 5, 30)]:
        done = 0
        for size in chunks:
            logits = loop.run(0, prompt[None, done : done + size], [done])["logits"]
            done += size
        found.append((logits, loop.run(0, token, [40])["logits"]))
    for prefilled, decoded in found[1:]:
        np.testing.assert_array_equal(prefilled, found[0][0])
        np.testing.assert_array_equal(decoded, found[0][1])


def test_weights_that_fusing_left_unused_are_not_written(llama: tuple[Any, Path]) -> None:
    model, path = llama
    num_bytes = sum(parameter.numel() * 4 for parameter in model.parameters())
    angles = MAX_POSITIONS * LLAMA_SIZES["hidden_size"] // LLAMA_SIZES["num_attention_heads"] * 4
    assert path.with_name("model.onnx.data").stat().st_size <= (num_bytes + angles) * 1.05
