"""What only a GPU can show: proofs of its versions, nothing overtaken between two libraries, memory that stays flat."""

from __future__ import annotations

import random

import pytest
import torch

from exporters import ExportConfig, export
from triton_backend.config import VersionConfig
from triton_backend.model_runner import DecodeToken, ModelRunner

from .conftest import ON_GPU
from .test_cuda_graphs import CLOSE

pytestmark = [pytest.mark.integration, pytest.mark.gpu]

on_gpu = pytest.mark.parametrize("version", ON_GPU, indirect=True)
NUM_STEPS = 100
# Random weights leave little between the likeliest tokens; bf16 has 8 bits for that.
OF_BF16 = {"min_agreement": 0.8, "min_text_agreement": 0.8, "max_kl_mean": 0.05, "max_kl_p99": 0.5}


def prompt_of(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(1, 400), k=length)


@pytest.mark.parametrize("has_graphs", [False, True], ids=["steps", "graphs"])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_versions_for_cuda_are_proven_on_the_gpu(checkpoint, tmp_path, precision, has_graphs):
    asked = ExportConfig(
        str(checkpoint),
        tmp_path / "1",
        device="cuda",
        precision=precision,
        engine={"cuda_graphs": has_graphs},
        thresholds=OF_BF16 if precision == "bf16" else {},
    )
    assert export(asked).passed, (tmp_path / "1" / "certificate.json").read_text()


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_versions_of_few_bits_run_on_the_gpu(checkpoint, tmp_path, precision):
    asked = ExportConfig(str(checkpoint), tmp_path / "1", device="cuda", precision=precision)
    export(asked, certify=False)
    runner = ModelRunner(tmp_path / "1", VersionConfig.read(tmp_path / "1"))
    runner.warm_up()
    runner.prefill(0, prompt_of(1, 30), 0, want_logits=True)
    assert torch.isfinite(runner.outputs.logits[0]).all()


@on_gpu
def test_what_is_written_is_what_is_read_next(version):
    """Tokens that change every step, chosen by nothing: a step that read old inputs would give other logits."""
    lengths = [3, 50, 17, 1, 90, 8]
    texts = [prompt_of(100 + row, NUM_STEPS) for row in range(len(lengths))]

    def logits_of_the_fifth(rows: list[int]) -> torch.Tensor:
        runner = ModelRunner(version, VersionConfig.read(version))
        runner.warm_up()
        for row in rows:
            runner.prefill(row, prompt_of(row, lengths[row]), 0, want_logits=True)
        found = []
        for step in range(NUM_STEPS):
            runner.decode([DecodeToken(row, texts[row][step], lengths[row] + step) for row in rows], want_logits=True)
            found.append(runner.outputs.logits[4].clone())
        return torch.stack(found)

    assert (logits_of_the_fifth([0, 1, 2, 3, 4, 5]) - logits_of_the_fifth([4])).abs().max() < CLOSE


@on_gpu
def test_a_row_that_was_saved_goes_on_where_it_was(version):
    runner = ModelRunner(version, VersionConfig.read(version))
    runner.warm_up()
    runner.prefill(0, prompt_of(1, 60), 0, want_logits=True)
    token = DecodeToken(0, 7, 60)
    runner.decode([token], want_logits=True)
    expected = runner.outputs.logits[0].cpu()
    saved = runner.save_row(0, 60)
    runner.free_row(0)
    runner.prefill(0, prompt_of(2, 80), 0, want_logits=True)
    runner.restore_row(0, saved)
    runner.decode([token], want_logits=True)
    assert torch.equal(runner.outputs.logits[0].cpu(), expected)


@on_gpu
def test_memory_of_the_gpu_is_flat(client):
    def run(seed: int) -> None:
        options = {"temperature": 1.0, "seed": seed, "max_tokens": 20, "logprobs": 2, "repetition_penalty": 1.1}
        answers = [client.submit(prompt_of(seed + i, 5 + 9 * i), **options) for i in range(16)]
        assert all(answer.last().error is None for answer in answers)

    run(0)
    before = torch.cuda.mem_get_info()[0]
    for seed in range(1, 20):
        run(seed)
    assert before - torch.cuda.mem_get_info()[0] <= 64 << 20
