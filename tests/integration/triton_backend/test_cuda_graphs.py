"""Decode steps of few sizes and one length, as CUDA graphs need them, give what steps of every size give.

The sizes are tested on CPU, where ONNX Runtime captures nothing; what is captured, on a GPU only.
"""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from triton_backend.config import VersionConfig
from triton_backend.model_runner import DecodeToken, ModelRunner, captured_rows

pytestmark = pytest.mark.integration

NUM_STEPS = 20
CLOSE = 0.5
"""Of logits up to 13 in 16 bits: other orders of sums differ by a tenth, wrong inputs by whole units."""


def with_graphs(version, has_graphs: bool) -> ModelRunner:
    config = VersionConfig.read(version)
    engine = dataclasses.replace(config.engine, cuda_graphs=False)
    object.__setattr__(engine, "cuda_graphs", has_graphs)  # EngineConfig knows that CPU has none
    runner = ModelRunner(version, VersionConfig(config.model, engine))
    runner.warm_up()
    return runner


def logits_of_a_crowd(runner: ModelRunner) -> torch.Tensor:
    """Logits (steps, rows, V) of five sequences of different lengths that go on with given tokens."""
    rng = random.Random(0)
    lengths = [1, 40, 7, 120, 16]
    for row, length in enumerate(lengths):
        runner.prefill(row, rng.choices(range(1, 400), k=length), 0, want_logits=True)
    found = []
    for step in range(NUM_STEPS):
        tokens = [DecodeToken(row, rng.randrange(1, 400), length + step) for row, length in enumerate(lengths)]
        runner.decode(tokens if step % 2 else tokens[1:], want_logits=True)
        if not step % 2:  # a row may miss a step: it is an idle lane, whose own token comes later
            runner.decode(tokens[:1], want_logits=True)
        found.append(runner.outputs.logits[: len(lengths)].cpu().clone())
    return torch.stack(found)


@pytest.mark.parametrize(
    ("num_rows", "expected"),
    [(1, (1,)), (4, (1, 2, 4)), (9, (1, 2, 4, 8, 9)), (33, (1, 2, 4, 8, 16, 24, 32, 33))],
)
def test_few_sizes_are_captured_and_the_largest_is_every_row(num_rows, expected):
    assert captured_rows(num_rows) == expected


def test_steps_of_captured_sizes_give_the_logits_of_steps_of_any_size(version):
    expected = logits_of_a_crowd(with_graphs(version, False))
    captured = with_graphs(version, True)
    found = logits_of_a_crowd(captured)
    assert {num_rows for num_rows, _ in captured._step_runs} == {1, 2, 4, 8, 9}
    # Kernels of CUDA sum in another order for another longest length.
    tolerance = 0.0 if captured._device.type == "cpu" else CLOSE
    assert (found - expected).abs().max() <= tolerance
