"""Adapters in slots: the tokens that PEFT gives, merged or not, whoever shares the batch; nothing where unused."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import peft
import pytest
import torch
from safetensors.numpy import load_file

from exporters import ExportConfig, export
from exporters.adapters import open_adapter, slot_tensors
from exporters.decoder import measure, trace
from exporters.errors import InvalidConfig, UnsupportedArchitecture
from exporters.fusions import fuse
from exporters.graph import save_graph
from exporters.lora import add_lora_slots
from exporters.reference_loop import MAX_POSITIONS, GraphLoop, export_graph, generate
from tests.integration.exporters.conftest import VOCAB_SIZE, make_model
from triton_backend.config import LoraConfig, VersionConfig

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[3]
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
RANK = 4
NUM_NEW_TOKENS = 8
NAMES = ("poet", "lawyer", "cook")
ONE_LAYER = {"num_hidden_layers": 1}

# case → (name, changes, targets, are columns permuted)
CASES: dict[str, tuple[str, dict[str, Any], tuple[str, ...], bool]] = {
    "packed": ("llama", ONE_LAYER, ALL, False),
    "packed_with_biases_in_part": ("qwen2", {}, ("q_proj", "v_proj"), False),
    "the_middle_of_what_is_packed": ("qwen2", {}, ("k_proj",), False),
    "conv1d": ("gpt2", {"n_layer": 1}, ("c_attn", "c_proj", "c_fc"), False),
    "packed_by_the_model": ("phi3", {}, ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"), False),
    "mixed_by_head": (
        "gpt_neox",
        {"hidden_size": 128, "num_attention_heads": 2},
        ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
        True,
    ),
    "interleaved_beside_the_mlp": ("cohere", {}, ALL, False),
    "norms_of_queries_and_keys": ("qwen3", {}, ALL, False),
}


def export_with_slots(
    model: Any, folder: Path, targets: Sequence[str], num_slots: int = 3, **options: Any
) -> tuple[Path, LoraConfig]:
    program = trace(model, measure(model).layers, 64)
    fuse(program.model, MAX_POSITIONS)
    lora = add_lora_slots(program.model, targets, num_slots, RANK, model, **options)
    folder.mkdir(exist_ok=True)
    save_graph(program, folder / "model.onnx")
    return folder / "model.onnx", lora


def adapt(model: Any, folder: Path, targets: Sequence[str], ranks: Sequence[int]) -> tuple[Any, list[Path]]:
    """Wrap ``model`` with one random adapter per rank, named as in NAMES, and save each in a folder."""
    wrapped = None
    for number, (name, rank) in enumerate(zip(NAMES, ranks, strict=False)):
        config = peft.LoraConfig(
            r=rank,
            lora_alpha=2 * rank + number,
            target_modules=list(targets),
            use_rslora=number == 1,
            fan_in_fan_out=model.config.model_type == "gpt2",
            task_type="CAUSAL_LM",
        )
        if wrapped is None:
            wrapped = peft.get_peft_model(model, config, adapter_name=name)
        else:
            wrapped.add_adapter(name, config)
    assert wrapped is not None
    generator = torch.Generator().manual_seed(5)
    for path, parameter in wrapped.named_parameters():
        if "lora_" in path:
            torch.nn.init.normal_(parameter, std=0.15, generator=generator)
    wrapped.save_pretrained(folder)
    return wrapped.eval(), [folder / name for name in NAMES[: len(ranks)]]


def loop_with(path: Path, lora: LoraConfig, folders: Sequence[Path], adapter_ids: Sequence[int]) -> GraphLoop:
    """One cache row per adapter id; the adapter of ``folders[i]`` is in slot i + 1."""
    stacked: dict[str, np.ndarray] = {}
    for target in lora.targets:
        stacked[f"lora.{target.name}.a"] = np.zeros((lora.num_slots + 1, target.in_features, lora.rank), np.float32)
        stacked[f"lora.{target.name}.b"] = np.zeros((lora.num_slots + 1, lora.rank, target.out_features), np.float32)
    for slot, folder in enumerate(folders, start=1):
        for name, (a, b) in slot_tensors(open_adapter(folder), lora).items():
            stacked[f"lora.{name}.a"][slot], stacked[f"lora.{name}.b"][slot] = a, b
    rows = {"adapter_ids": np.array(adapter_ids, np.int64)}
    return GraphLoop(path, len(adapter_ids), 48, extra_inputs=stacked, extra_row_inputs=rows)


def prompts_of(lengths: Sequence[int]) -> list[list[int]]:
    generator = np.random.default_rng(1)
    return [generator.integers(3, VOCAB_SIZE, length).tolist() for length in lengths]


@pytest.mark.parametrize("case", CASES)
def test_tokens_and_logits_are_those_of_peft_merged_and_unmerged(case: str, tmp_path: Path) -> None:
    name, changes, targets, is_permuted = CASES[case]
    model = make_model(name, **changes)
    path, lora = export_with_slots(model, tmp_path, targets)
    assert {target.name.rpartition(".")[2] for target in lora.targets} == set(targets)
    assert any(target.columns for target in lora.targets) == is_permuted

    (prompt,) = prompts_of([17])
    plain = generate(model, prompt, NUM_NEW_TOKENS)
    wrapped, folders = adapt(model, tmp_path / "adapters", targets, [3])
    unmerged = generate(model, prompt, NUM_NEW_TOKENS)
    merged = copy.deepcopy(wrapped).merge_and_unload()
    assert unmerged == generate(merged, prompt, NUM_NEW_TOKENS) != plain

    loop = loop_with(path, lora, folders, [1, 0])
    assert loop.greedy([prompt, prompt], [(9, 8), (17,)], NUM_NEW_TOKENS) == [unmerged, plain]
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([prompt])).logits[0, -1].numpy()
    found = loop.run(0, np.array([prompt]), [0])["logits"][0]
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


@dataclass(frozen=True)
class Adapted:
    """A Llama with adapters of ranks 4, 2 and 1 in slots 1, 2 and 3."""

    model: Any
    wrapped: Any
    folders: list[Path]
    path: Path
    lora: LoraConfig
    plain: Path

    def loop(self, adapter_ids: Sequence[int]) -> GraphLoop:
        return loop_with(self.path, self.lora, self.folders, adapter_ids)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    folder = tmp_path_factory.mktemp("lora")
    model = make_model("llama")
    plain = export_graph(model, folder / "plain")
    path, lora = export_with_slots(model, folder / "slots", ALL)
    wrapped, folders = adapt(model, folder / "adapters", ALL, [4, 2, 1])
    return Adapted(model, wrapped, folders, path, lora, plain)


def test_adapters_of_different_ranks_share_a_ragged_batch(llama: Adapted) -> None:
    prompts = prompts_of([19, 3, 7, 2, 11])
    ids = [2, 0, 3, 1, 2]
    expected = []
    for slot, prompt in zip(ids, prompts, strict=True):
        if slot:
            llama.wrapped.set_adapter(NAMES[slot - 1])
            expected.append(generate(llama.model, prompt, NUM_NEW_TOKENS))
        else:
            with llama.wrapped.disable_adapter():
                expected.append(generate(llama.model, prompt, NUM_NEW_TOKENS))
    assert llama.loop(ids).greedy(prompts, [(10, 9), (3,), (7,), (2,), (11,)], NUM_NEW_TOKENS) == expected


def test_a_row_s_logits_do_not_depend_on_the_adapters_of_others_to_the_bit(llama: Adapted) -> None:
    lengths, ids = [21, 5, 9, 2], [1, 3, 0, 2]
    tokens = np.array([[7], [8], [9], [10]])

    def run(ids: Sequence[int], rows: Sequence[int]) -> dict[int, bytes]:
        loop = llama.loop([ids[row] for row in rows])
        for index, row in enumerate(rows):
            loop.prefill(index, prompts_of(lengths)[row], [lengths[row]])
        logits = loop.run(0, tokens[list(rows)], [lengths[row] for row in rows])["logits"]
        return {row: logits[index].tobytes() for index, row in enumerate(rows)}

    together = run(ids, range(4))
    for row in range(4):
        assert run(ids, [row])[row] == together[row]
    assert run([1, 1, 0, 3], range(4))[0] == together[0]


def test_logits_do_not_depend_on_the_chunks_of_a_prompt_to_the_bit(llama: Adapted) -> None:
    (prompt,) = prompts_of([24])
    found = set()
    for chunks in [(24,), (2, 22), (11, 13), (5, 5, 14)]:
        loop = llama.loop([1])
        loop.prefill(0, prompt, chunks)
        found.add(loop.run(0, np.array([[7]]), [24])["logits"].tobytes())
    assert len(found) == 1


@pytest.mark.parametrize("ids", [[0, 0, 0], [0, 3, 0]])
def test_rows_without_an_adapter_are_those_of_the_graph_without_slots_to_the_bit(
    ids: list[int], llama: Adapted
) -> None:
    _check_no_op(llama.plain, llama.loop(ids), ids)


def test_biases_and_activations_behind_a_product_stay_the_same_to_the_bit(tmp_path: Path) -> None:
    # ONNX Runtime fuses a product with its bias, and a bias with the GELU behind it.
    model = make_model("gpt2", n_layer=1)
    plain = export_graph(model, tmp_path / "plain")
    targets = ("c_attn", "c_proj", "c_fc")
    path, lora = export_with_slots(model, tmp_path / "slots", targets)
    _, folders = adapt(model, tmp_path / "adapters", targets, [2])
    for ids in ([0, 0, 0], [0, 1, 0]):
        _check_no_op(plain, loop_with(path, lora, folders, ids), ids)


def _check_no_op(plain: Path, loop: GraphLoop, ids: Sequence[int]) -> None:
    lengths = [19, 4, 2]
    found = []
    for each in (GraphLoop(plain, 3, 48), loop):
        for row, prompt in enumerate(prompts_of(lengths)):
            each.prefill(row, prompt, [len(prompt)])
        found.append(each.run(0, np.array([[7], [8], [9]]), lengths)["logits"])
    for row, slot in enumerate(ids):
        assert (found[0][row].tobytes() == found[1][row].tobytes()) == (slot == 0)


def test_slots_are_inputs_and_one_branch_for_products_of_the_same_input(llama: Adapted) -> None:
    graph = onnx.load(str(llama.path), load_external_data=False).graph
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in graph.input
    }
    assert shapes["adapter_ids"] == ["batch"]
    assert shapes["lora.model.layers.1.self_attn.k_proj.a"] == [4, 64, RANK]
    assert shapes["lora.model.layers.1.self_attn.k_proj.b"] == [4, RANK, 32]
    branches = [node.name for node in graph.node if node.op_type == "If"]
    assert branches == [
        f"/model/layers.{layer}/{module}/lora/If"
        for layer in range(2)
        for module in ("self_attn", "self_attn/o_proj", "mlp", "mlp/down_proj")
    ]
    plain = onnx.load(str(llama.plain), load_external_data=False).graph
    assert len(graph.node) == len(plain.node) + len(branches) + 2  # whether any row uses an adapter


def test_a_graph_may_do_without_branches(tmp_path: Path) -> None:
    model = make_model("llama", **ONE_LAYER)
    path, lora = export_with_slots(model, tmp_path, ("q_proj", "v_proj"), is_skipped_when_unused=False)
    assert "If" not in {node.op_type for node in onnx.load(str(path), load_external_data=False).graph.node}
    wrapped, folders = adapt(model, tmp_path / "adapters", ("q_proj", "v_proj"), [4])
    prompts = prompts_of([9, 9])
    unmerged = generate(model, prompts[0], NUM_NEW_TOKENS)
    with wrapped.disable_adapter():
        plain = generate(model, prompts[1], NUM_NEW_TOKENS)
    loop = loop_with(path, lora, folders, [1, 0])
    assert loop.greedy(prompts, [(9,), (9,)], NUM_NEW_TOKENS) == [unmerged, plain]


def test_a_target_that_the_model_or_the_graph_does_not_have_is_refused() -> None:
    model = make_model("llama", **ONE_LAYER)
    empty = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 20}), ir_version=10)
    with pytest.raises(InvalidConfig, match=r"lora_targets has value 'c_attn'; .* q_proj"):
        add_lora_slots(empty, ["q_proj", "c_attn"], 1, RANK, model)
    with pytest.raises(UnsupportedArchitecture, match=r"layers\.0\.self_attn\.q_proj of LlamaForCausalLM .* 0 times"):
        add_lora_slots(empty, ["q_proj"], 1, RANK, model)


def test_program_makes_an_adapter_ready_for_a_version(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint, version, out = make_checkpoint("llama"), tmp_path / "version", tmp_path / "poet"
    targets = ("q_proj", "v_proj", "down_proj")
    slots = {"lora_slots": 2, "lora_rank": RANK, "lora_targets": targets}
    export(ExportConfig(str(checkpoint), version, max_model_len=48, **slots), certify=False)
    model = make_model("llama")
    _, (folder,) = adapt(model, tmp_path / "adapters", targets, [2])

    def run(*arguments: str) -> tuple[int, list[dict[str, Any]]]:
        command = [sys.executable, "-m", "exporters.adapters", *arguments]
        found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)
        return found.returncode, [json.loads(line) for line in found.stdout.splitlines()]

    exit_code, events = run(str(folder), str(version), str(out), "--name", "poet")
    assert (exit_code, [event["event"] for event in events]) == (0, ["started", "finished"])
    assert (events[-1]["name"], events[-1]["rank"], len(events[-1]["targets"])) == ("poet", 2, 6)
    exit_code, events = run(str(folder), str(version), str(out))
    assert (exit_code, events[-1]["event"], events[-1]["code"]) == (1, "error", "OUTPUT_EXISTS")

    lora = VersionConfig.read(version).model.lora
    assert lora is not None
    loop = loop_with(version / "model.onnx", lora, [], [2])
    for name, matrix in load_file(out / "adapter.safetensors").items():
        loop.extra_inputs[name][2] = matrix
    (prompt,) = prompts_of([12])
    assert loop.greedy([prompt], [(12,)], NUM_NEW_TOKENS) == [generate(model, prompt, NUM_NEW_TOKENS)]
