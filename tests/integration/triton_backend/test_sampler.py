"""The sampler's distributions against Hugging Face's logits warpers, and its draws against the distribution."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from triton_backend.logits_processors import TokenCounts
from triton_backend.protocol import GenerateRequest
from triton_backend.sampler import candidate_probs, choose, draw
from triton_backend.sampling_params import SamplingParams
from triton_backend.sequence import RequestState, SampledToken, Sequence

pytestmark = pytest.mark.integration

V = 500


def sequence(prompt_ids=(1,), **params) -> Sequence:
    request = GenerateRequest("r", SamplingParams(**params))
    return RequestState.create(request, tuple(prompt_ids), sink=None, now_s=0.0).lead


def warped(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Hugging Face's probabilities (B, V)."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k > 0:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p > 0.0:
        warpers.append(MinPLogitsWarper(params.min_p))
    return torch.softmax(warpers(torch.zeros((1, 1), dtype=torch.long), logits), dim=-1)


PARAMS = [
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.3, "top_k": 50, "top_p": 0.8},
    {"temperature": 1.0, "top_k": 40, "min_p": 0.1},
    {"temperature": 0.9, "top_k": 64, "top_p": 0.95, "min_p": 0.02},
    {"temperature": 2.0, "top_k": 1},
    {"temperature": 1.0, "top_k": 7, "top_p": 0.0},
]


@pytest.mark.parametrize("params", PARAMS)
def test_candidates_have_the_probabilities_of_hugging_faces_warpers(params):
    torch.manual_seed(1)
    logits = torch.randn(3, V) * 3
    top = torch.topk(logits, 64)
    sequences = [sequence(**params) for _ in range(3)]
    found = torch.zeros(3, V).scatter(1, top.indices, candidate_probs(top.values, sequences))
    torch.testing.assert_close(found, warped(logits, sequences[0].params))


def test_rows_with_different_parameters_do_not_mix():
    torch.manual_seed(2)
    top = torch.topk(torch.randn(len(PARAMS), V), 64).values
    sequences = [sequence(**params) for params in PARAMS]
    together = candidate_probs(top, sequences)
    for i, one in enumerate(sequences):
        assert torch.equal(together[i : i + 1], candidate_probs(top[i : i + 1], [one]))


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0},
        {"temperature": 0.6, "min_p": 0.05},
        {"temperature": 1.0, "top_p": 0.5},
        {"temperature": 3.0, "top_p": 0.97},
        {"temperature": 1.0, "top_p": 0.9, "min_p": 0.01},
        {"temperature": 1.5, "top_k": 200, "top_p": 0.9},
    ],
)
def test_draws_from_full_logits_follow_hugging_faces_distribution(params):
    torch.manual_seed(3)
    logits = torch.randn(1, V) * 2
    one = sequence(seed=5, **params)
    expected = warped(logits, one.params)[0]
    num_draws = 4000
    counts = torch.zeros(V)
    for _ in range(num_draws):
        counts[choose(logits.clone(), [one])[0]] += 1
    assert counts[expected == 0].sum() == 0, "a token that is cut was drawn"
    # The mean absolute deviation of a binomial count says how far an honest sample of this size strays in sum.
    honest = torch.sqrt(2 * expected * (1 - expected) / (torch.pi * num_draws)).sum()
    assert (counts / num_draws - expected).abs().sum() < 1.3 * honest


def test_a_draw_is_decided_by_the_sequences_own_seed_alone():
    torch.manual_seed(4)
    logits = torch.randn(6, V)
    kinds = [{"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.7}, {"temperature": 0.0}] * 2
    together = choose(logits.clone(), [sequence(seed=i, **kind) for i, kind in enumerate(kinds)])
    alone = [choose(logits[i : i + 1].clone(), [sequence(seed=i, **kind)])[0] for i, kind in enumerate(kinds)]
    assert together == alone


class _Largest:
    def random(self) -> float:
        return 1.0 - 2**-53


def test_a_draw_never_falls_on_a_token_without_probability():
    one = sequence(temperature=1.0)
    one.rng = _Largest()
    assert draw(torch.tensor([[0.5, 0.5, 0.0, 0.0]]), [one]).tolist() == [1]


def test_repetition_penalty_equals_hugging_faces_and_the_others_openais():
    torch.manual_seed(5)
    logits = torch.randn(V)
    one = sequence(prompt_ids=(3, 4, 4), repetition_penalty=1.4)
    for token_id in (7, 7, 9):
        one.append(SampledToken(token_id))
    counts = TokenCounts(one, V)
    counts.update(one.output_ids)
    found = logits.clone()
    counts.apply(found, one.params)
    ids = torch.tensor([[3, 4, 4, 7, 7, 9]])
    assert torch.equal(found, RepetitionPenaltyLogitsProcessor(1.4)(ids, logits[None].clone())[0])

    found = logits.clone()
    counts.apply(found, SamplingParams(presence_penalty=0.5, frequency_penalty=0.25))
    expected = logits.clone()
    expected[7] -= 0.5 + 2 * 0.25
    expected[9] -= 0.5 + 0.25
    torch.testing.assert_close(found, expected)
