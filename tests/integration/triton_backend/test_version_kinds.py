"""Which version folders the engine serves, by precision, cache type and adapters, and which it refuses and why."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import onnx
import pytest
import torch
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

from exporters import ExportConfig, export
from triton_backend.config import VersionConfig
from triton_backend.errors import InvalidRequest, VersionFolderError
from triton_backend.loading import load_engine
from triton_backend.model_runner import DecodeToken, ModelRunner

from .conftest import Client
from .tiny_graphs import NUM_LAYERS, WIDTH, TinyModel, edited, lora_config, write_version

pytestmark = pytest.mark.integration

NUM_SLOTS, RANK = 2, 4


@pytest.fixture(scope="module")
def model(tokenizer) -> TinyModel:
    return TinyModel(len(tokenizer))


@pytest.fixture(scope="module")
def half(model, checkpoint, tmp_path_factory):
    return write_version(tmp_path_factory.mktemp("fp16") / "1", model, checkpoint, cache_type="fp16")


@pytest.fixture(scope="module")
def lora(model, checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora") / "1"
    return write_version(folder, model, checkpoint, lora=lora_config(NUM_SLOTS, RANK))


@pytest.fixture
def runner(lora):
    return ModelRunner(lora, VersionConfig.read(lora))


def prompt_of(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(1, 400), k=length)


def serves_the_same_alone_and_in_a_crowd(folder, tokenizer) -> list[list[int]]:
    """Greedy and seeded answers, bit for bit; returns the greedy ones."""
    engine, _ = load_engine(folder, is_sealed=False)
    try:
        client = Client(engine, tokenizer)
        options = [
            {
                "max_tokens": 10 + i,
                "ignore_eos": True,
                **({"temperature": 1.0, "seed": i, "logprobs": 1} if i % 2 else {}),
            }
            for i in range(12)
        ]
        prompts = [prompt_of(i, 1 + i * 4) for i in range(12)]
        answers = [client.submit(prompt, **options[i]) for i, prompt in enumerate(prompts)]
        together = [answer.last().outputs for answer in answers]
        assert [client.ask(prompt, **options[i]).outputs for i, prompt in enumerate(prompts)] == together
        return [list(outputs[0].token_ids) for outputs in together[::2]]
    finally:
        engine.stop()


@pytest.mark.exact
def test_weights_of_eight_bits_give_the_same_bits_beside_31_others_after_preemption_and_with_shared_prefixes(
    checkpoint, tokenizer, tmp_path
):
    folder = tmp_path / "1"
    export(ExportConfig(str(checkpoint), folder, precision="int8", max_num_seqs=32), certify=False)
    shared = prompt_of(99, 70)
    prompts = [shared[: 70 * (i % 3 > 0)] + prompt_of(i, 1 + 3 * i) for i in range(32)]
    kinds = [{}, {"temperature": 1.0, "top_p": 0.9}, {"temperature": 1.0, "n": 2}, {"beam_width": 3, "n": 3}]
    common = {"max_tokens": 40, "ignore_eos": True, "priority": 5, "seed": 4}
    outputs = {}
    for is_caching in (False, True):
        config = VersionConfig.read(folder)
        settings = dataclasses.replace(config.engine, enable_prefix_caching=is_caching, max_num_batched_tokens=64)
        VersionConfig(config.model, settings).write(folder)
        engine, _ = load_engine(folder, is_sealed=False)
        client = Client(engine, tokenizer)
        try:
            answers = [client.submit(prompt, **common, **kinds[i % 4]) for i, prompt in enumerate(prompts)]
            for _ in range(5):
                client.ask(prompt_of(7, 9), n=20, max_tokens=2, temperature=1.0, priority=0)
            crowd = [answer.last() for answer in answers]
            alone = [client.ask(prompt, **common, **kinds[i % 4]) for i, prompt in enumerate(prompts)]
        finally:
            engine.stop()
        assert sum(response.metrics["preemptions"] for response in crowd) > 0
        assert any(response.metrics["cached_tokens"] for response in alone) == is_caching
        outputs[is_caching] = [response.outputs for response in crowd]
        assert outputs[is_caching] == [response.outputs for response in alone]
    assert outputs[True] == outputs[False]


def test_a_cache_of_half_precision_gives_the_same_tokens_alone_and_in_a_crowd(half, model, tokenizer):
    tokens = serves_the_same_alone_and_in_a_crowd(half, tokenizer)
    expected = [model.greedy(prompt_of(i, 1 + i * 4), 1) for i in range(0, 12, 2)]
    assert [ids[:1] for ids in tokens] == expected


def test_a_cache_of_half_precision_is_half_as_large_and_its_logits_are_float32(half):
    runner = ModelRunner(half, VersionConfig.read(half))
    runner.prefill(0, prompt_of(1, 9), 0, want_logits=True)
    assert {tensor.data.dtype for tensor in runner._cache.tensors} == {torch.float16}
    logits = runner.outputs.logits[0].numpy()
    assert logits.dtype == np.float32 and np.isfinite(logits).all()


def test_weights_of_four_bits_give_the_same_tokens_alone_and_in_a_crowd(lora, tokenizer, tmp_path):
    folder = edited(lora, tmp_path / "1", precision="int4")
    # Level 4, integer products: at the other levels a row's last bits depend on how many rows there are.
    quantizer = MatMulNBitsQuantizer(onnx.load(folder / "model.onnx"), block_size=32, accuracy_level=4)
    quantizer.process()
    assert any(node.op_type == "MatMulNBits" for node in quantizer.model.model.graph.node)
    onnx.save(quantizer.model.model, folder / "model.onnx")
    serves_the_same_alone_and_in_a_crowd(folder, tokenizer)


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        (
            {"precision": "bf16"},
            "has precision 'bf16', but ONNX Runtime's CPU kernels compute in fp32, fp16, int8, int4",
        ),
        ({"cache_type": "bf16"}, "has cache_type 'bf16', but ONNX Runtime's attention on CPU takes fp32, fp16 only"),
        (
            {"kind": "encoder", "pooling": "mean", "embedding_size": 32},
            "is an encoder (Tiny): it gives embeddings and generates no text",
        ),
    ],
)
def test_a_version_that_cannot_run_here_is_refused_with_the_reason(lora, tmp_path, facts, said):
    with pytest.raises(VersionFolderError) as caught:
        load_engine(edited(lora, tmp_path / "1", **facts), is_sealed=False)
    assert said in str(caught.value)


def test_a_graph_with_adapters_serves_requests_without_one_as_if_it_had_none(lora, model, tokenizer):
    tokens = serves_the_same_alone_and_in_a_crowd(lora, tokenizer)
    for i, ids in zip(range(0, 12, 2), tokens, strict=True):
        assert ids == model.greedy(prompt_of(i, 1 + i * 4), 10 + i)


def adapter_of(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"a": (WIDTH, RANK), "b": (RANK, WIDTH)}
    return {
        f"lora.layers.{layer}.query.{part}": rng.normal(0, 0.5, shape).astype(np.float32)
        for layer in range(NUM_LAYERS)
        for part, shape in shapes.items()
    }


def greedy(runner: ModelRunner, rows: dict[int, tuple[list[int], int]], num_new: int) -> dict[int, list[int]]:
    """Decode the prompts of ``rows`` (row → prompt and adapter slot) together."""
    tokens: dict[int, list[int]] = {}
    for row, (prompt, slot) in rows.items():
        runner.free_row(row)
        runner.set_adapter(row, slot)
        runner.prefill(row, prompt, 0, want_logits=False)
        tokens[row] = [int(runner.outputs.top_ids[row, 0])]
    for step in range(num_new - 1):
        news = [DecodeToken(row, tokens[row][-1], len(prompt) + step) for row, (prompt, _) in rows.items()]
        runner.decode(news, want_logits=False)
        for row in rows:
            tokens[row].append(int(runner.outputs.top_ids[row, 0]))
    return tokens


def test_rows_with_different_adapters_share_a_batch_and_each_follows_its_own(runner, model):
    adapters = {1: adapter_of(1), 2: adapter_of(2)}
    for slot, adapter in adapters.items():
        runner.load_adapter(slot, adapter)
    prompt = prompt_of(5, 11)
    rows = {row: (prompt, slot) for row, slot in enumerate((0, 1, 2, 1))}
    together = greedy(runner, rows, 20)
    assert together[1] == together[3] and len({tuple(ids) for ids in together.values()}) == 3
    for row, (_, slot) in rows.items():
        assert together[row] == model.greedy(prompt, 20, adapter=adapters.get(slot))
        assert greedy(runner, {row: rows[row]}, 20) == {row: together[row]}


def test_a_copied_row_keeps_its_adapter_and_a_cleared_one_has_none(runner):
    runner.load_adapter(2, adapter_of(2))
    prompt = prompt_of(6, 7)
    greedy(runner, {0: (prompt, 2)}, 1)
    runner.copy_row(0, 3, len(prompt))
    assert runner._adapters.adapter_ids.tolist()[:4] == [2, 0, 0, 2]
    runner.free_row(0)
    assert runner._adapters.adapter_ids.tolist()[:4] == [0, 0, 0, 2]


def test_what_an_adapter_leaves_out_stays_unchanged_and_a_new_one_replaces_it_whole(runner, model):
    prompt = prompt_of(7, 9)
    runner.load_adapter(1, adapter_of(3))
    half_of_it = {name: matrix for name, matrix in adapter_of(4).items() if ".0." in name}
    runner.load_adapter(1, half_of_it)
    zeros = {name: np.zeros_like(matrix) for name, matrix in adapter_of(4).items()}
    assert greedy(runner, {0: (prompt, 1)}, 15)[0] == model.greedy(prompt, 15, adapter={**zeros, **half_of_it})
    runner.load_adapter(1, {})
    assert greedy(runner, {0: (prompt, 1)}, 15)[0] == model.greedy(prompt, 15)


@pytest.mark.parametrize(
    ("slot", "tensors", "said"),
    [
        (0, {}, "slot has value 0; this model has adapter slots 1 to 2"),
        (3, {}, "slot has value 3; this model has adapter slots 1 to 2"),
        (
            1,
            {"lora.layers.9.query.a": np.zeros((WIDTH, RANK))},
            "'lora.layers.9.query.a', which this model cannot change",
        ),
        (1, {"lora.layers.0.query.a": np.zeros((WIDTH, 8))}, "has shape (32, 8); this model expects (32, 4)"),
        (1, {"lora.layers.0.query.a": np.full((WIDTH, RANK), np.nan, np.float32)}, "holds NaN or infinite values"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_and_changes_nothing(runner, slot, tensors, said):
    runner.load_adapter(1, adapter_of(1))
    before = {name: stacked.clone() for name, stacked in runner._adapters.tensors.items()}
    with pytest.raises(InvalidRequest) as caught:
        runner.load_adapter(slot, tensors)
    assert said in str(caught.value)
    for name, stacked in runner._adapters.tensors.items():
        assert torch.equal(stacked, before[name])


def test_a_slot_that_does_not_exist_cannot_be_chosen(runner):
    with pytest.raises(InvalidRequest, match="slot has value 3; this model has adapter slots 0"):
        runner.set_adapter(0, 3)
