"""The arithmetic of a certificate, on a model small enough to ask it token by token."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from exporters.comparison import TextComparison, TextLogits, judge, top_of
from exporters.logits import original_logits
from exporters.reference_loop import generate
from tests.integration.exporters.conftest import VOCAB_SIZE, make_model

pytestmark = pytest.mark.integration

PROMPT = [20, 30, 40]


def test_one_forward_pass_finds_the_same_first_difference_as_generate() -> None:
    model = make_model("llama")
    expected = generate(model, PROMPT, 12)
    for position in range(12):
        found = list(expected)
        found[position] = (found[position] + 1) % VOCAB_SIZE
        logits = original_logits(model, [*PROMPT, *found[:-1]], keep=12)
        verdict = judge(logits, found, 12, 1e-9)
        assert (verdict.result, verdict.position, verdict.num_equal) == ("mismatch", position, position)
        assert (verdict.expected, verdict.found) == (expected[position], found[position])
    logits = original_logits(model, [*PROMPT, *expected[:-1]], keep=12)
    assert judge(logits, expected, 12, 1e-9).result == "equal"
    assert judge(logits, expected, 12, 1e-9).num_agreeing == 12


def test_tokens_of_nearly_equal_logits_are_a_tie_and_end_the_comparison() -> None:
    logits = torch.tensor([[0.0, 5.0, 1.0, 1.0], [3.0, 1.0, 2.9999, 0.0], [0.0, 0.0, 1.0, 9.0]])
    tie = judge(logits, [1, 2, 2], 3, 1e-3)
    assert (tie.result, tie.num_equal, tie.position, tie.expected, tie.found) == ("tie", 1, 1, 0, 2)
    assert tie.logit_gap == pytest.approx(1e-4, rel=0.01)
    assert tie.num_agreeing == 1
    assert judge(logits, [1, 2, 3], 3, 1e-5).result == "mismatch"
    assert judge(logits, [1, 2, 3], 3, 1e-5).num_agreeing == 2


def test_too_few_tokens_are_a_mismatch_behind_the_last() -> None:
    logits = torch.tensor([[0.0, 5.0], [3.0, 1.0]])
    assert judge(logits, [1, 0], 3, 1e-3).result == "mismatch"
    assert judge(logits, [1, 0], 3, 1e-3).position == 2
    assert judge(logits[:0], [], 3, 1e-3).position == 0


def distributions(seed: int) -> torch.Tensor:
    return torch.randn(10, 6, generator=torch.Generator().manual_seed(seed))


def compare(left: torch.Tensor, right: torch.Tensor, targets: list[int], stride: int = 1) -> TextComparison:
    """The exported version reads in chunks, the original at once."""
    exported = TextLogits(stride)
    for start in range(0, len(right), 4):
        exported.add(right[start : start + 4], targets[start : start + 4])
    comparison = TextComparison(exported)
    comparison.add(left[:7], targets[:7])
    comparison.add(left[7:], targets[7:])
    return comparison


def test_texts_are_compared_as_the_definitions_say() -> None:
    left, right, targets = distributions(0), distributions(1), [0, 5, 2, 3, 1, 0, 4, 2, 2, 1]
    comparison = compare(left, right, targets)
    found = comparison.text()
    p, q = left.softmax(-1).numpy(), right.softmax(-1).numpy()
    divergence = (p * np.log(p / q)).sum(-1)
    assert found["kl_mean"] == pytest.approx(divergence.mean(), rel=1e-5)
    assert found["kl_max"] == pytest.approx(divergence.max(), rel=1e-5)
    assert found["kl_p99"] == pytest.approx(np.quantile(divergence, 0.99), rel=1e-5)
    rows = np.arange(10)
    ratio = math.exp(-np.log(q[rows, targets]).mean() + np.log(p[rows, targets]).mean())
    assert found["perplexity_ratio"] == pytest.approx(ratio, rel=1e-5)
    assert found["agreement"] == (p.argmax(-1) == q.argmax(-1)).mean()
    assert found["num_tokens"] == found["num_distributions"] == 10
    differences = comparison.logits()
    assert differences["max_difference"] == pytest.approx(float((left - right).abs().max()))
    assert differences["mean_difference"] == pytest.approx(float((left - right).abs().mean()))
    assert differences["max_relative_difference"] == pytest.approx(float((left - right).abs().max() / left.abs().max()))


def test_only_some_distributions_are_kept_but_every_token_counts() -> None:
    found = compare(distributions(0), distributions(1), [0] * 10, stride=3).text()
    every = compare(distributions(0), distributions(1), [0] * 10).text()
    kept = compare(distributions(0)[::3], distributions(1)[::3], [0] * 4).text()
    assert (found["num_tokens"], found["num_distributions"]) == (10, 4)
    assert found["perplexity_ratio"] == every["perplexity_ratio"]
    assert found["kl_mean"] == kept["kl_mean"] != every["kl_mean"]


def test_equal_texts_differ_by_nothing_and_broken_ones_are_no_number() -> None:
    same = compare(distributions(0), distributions(0), [0] * 10).text()
    assert (same["kl_max"], same["perplexity_ratio"], same["agreement"]) == (0, 1, 1)
    broken = compare(distributions(0), distributions(0) * math.nan, [0] * 10)
    assert broken.text()["kl_mean"] is None
    assert broken.logits()["max_difference"] is None


def test_differences_of_other_logits_are_added_to_those_of_the_text() -> None:
    comparison = compare(torch.zeros(10, 2), torch.zeros(10, 2), [0] * 10)
    found = comparison.logits([np.array([1.0, -10.0])], [np.array([1.5, -10.0])])
    assert (found["max_difference"], found["max_relative_difference"], found["num_positions"]) == (0.5, 0.05, 11)
    assert top_of(np.array([1.0, 3.0, 2.0])) == ((1, 3.0), (2, 2.0), (0, 1.0))


def test_a_suppressed_token_is_never_chosen_but_may_be_read() -> None:
    left, right, targets = distributions(0), distributions(1), [0, 5, 2, 3, 1, 0, 4, 2, 2, 1]
    exported = TextLogits(1, [2, 4])
    exported.add(right, targets)
    comparison = TextComparison(exported, [2, 4])
    comparison.add(left, targets)
    found, every = comparison.text(), compare(left, right, targets).text()
    assert {name: found[name] for name in found if name != "agreement"} == {
        name: every[name] for name in every if name != "agreement"
    }
    kept = [0, 1, 3, 5]
    assert found["agreement"] == (left[:, kept].argmax(-1) == right[:, kept].argmax(-1)).numpy().mean()
    logits = torch.tensor([[0.0, 5.0, 4.0]])
    assert judge(logits, [2], 1, 1e-3).result == "mismatch"
    assert judge(logits, [2], 1, 1e-3, [1]).result == "equal"
    assert top_of(logits[0].numpy(), [1]) == ((2, 4.0), (0, 0.0))


def test_what_is_no_number_is_no_json_either() -> None:
    logits = torch.tensor([[0.0, 5.0, -math.inf]])
    verdict = judge(logits, [2], 1, 1e-3)
    assert (verdict.result, verdict.logit_gap) == ("mismatch", None)
    assert top_of(np.array([math.nan, 3.0, -math.inf])) == ((1, 3.0),)
    both = torch.zeros(10, 2)
    both[:, 1] = -math.inf
    same = compare(both, both, [0] * 10)
    assert (same.logits()["max_difference"], same.text()["kl_max"]) == (0, 0), "−inf on both sides is no difference"
