"""Draws against Hugging Face's distributions, and changes of logits against its processors."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from triton_backend.config import LayerConfig, ModelConfig
from triton_backend.logits_processors import LogitsProcessors, needs_history
from triton_backend.model_runner import Outputs
from triton_backend.protocol import GenerateRequest
from triton_backend.sampler import Sampler
from triton_backend.sampling_params import SamplingParams
from triton_backend.sequence import RequestState, SampledToken, Sequence
from triton_backend.token_history import TokenHistory
from triton_backend.warpers import Head, draw, kept_by_warpers

pytestmark = pytest.mark.integration

V, K, EOS_ID = 3000, 64, 2
CONFIG = ModelConfig("Tiny", "tiny", V, 64, (LayerConfig(1, 8),), K, eos_token_ids=(EOS_ID,))


class Words:
    """A tokenizer whose words are numbers."""

    def encode_plain(self, text: str) -> tuple[int, ...]:
        return tuple(int(word) for word in text.split())

    def token_text(self, token_id: int) -> str:
        return str(token_id)


def sequence(prompt_ids=(1,), output_ids=(), **params) -> Sequence:
    request = GenerateRequest("r", SamplingParams(**params))
    one = RequestState.create(request, tuple(prompt_ids), sink=None, now_s=0.0).lead
    one.row = 0
    for token_id in output_ids:
        one.append(SampledToken(token_id))
    return one


def warped(logits: torch.Tensor, params: SamplingParams, min_kept: int = 1) -> torch.Tensor:
    """Hugging Face's probabilities (V)."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k > 0:
        warpers.append(TopKLogitsWarper(params.top_k, min_tokens_to_keep=min_kept))
    if params.top_p < 1.0:
        warpers.append(TopPLogitsWarper(params.top_p, min_tokens_to_keep=min_kept))
    if params.min_p > 0.0:
        warpers.append(MinPLogitsWarper(params.min_p, min_tokens_to_keep=min_kept))
    if params.typical_p < 1.0:
        warpers.append(TypicalLogitsWarper(params.typical_p, min_tokens_to_keep=min_kept))
    return torch.softmax(warpers(torch.zeros((1, 1), dtype=torch.long), logits[None]), dim=-1)[0]


DISTRIBUTIONS = [
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.3, "top_k": 50, "top_p": 0.8},
    {"temperature": 1.0, "top_k": 40, "min_p": 0.1},
    {"temperature": 0.9, "top_k": 64, "top_p": 0.95, "min_p": 0.02},
    {"temperature": 2.0, "top_k": 1},
    {"temperature": 1.0, "top_k": 7, "top_p": 0.0},
    {"temperature": 1.5, "top_k": 200, "top_p": 0.9},
    {"temperature": 1.0, "top_k": 10_000},
    {"temperature": 1.0},
    {"temperature": 0.2},
    {"temperature": 0.6, "min_p": 0.05},
    {"temperature": 1.0, "top_p": 0.5},
    {"temperature": 1.0, "top_p": 0.1},
    {"temperature": 3.0, "top_p": 0.97},
    {"temperature": 4.0, "top_p": 0.05},
    {"temperature": 1.0, "top_p": 0.9, "min_p": 0.01},
    {"temperature": 1.0, "typical_p": 0.6},
    {"temperature": 1.0, "typical_p": 0.9, "top_k": 100, "top_p": 0.9},
]


@pytest.mark.parametrize("params", DISTRIBUTIONS, ids=str)
def test_draws_follow_hugging_faces_distribution(params):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(V, generator=generator) * 2
    one = sequence(seed=5, **params)
    expected = warped(logits, one.params)
    num_draws = 3000
    counts = torch.zeros(V)
    for _ in range(num_draws):
        counts[draw(logits, Head.of(logits, K), one.params, one.rng)] += 1
    assert counts[expected == 0].sum() == 0, "a token that is cut was drawn"
    # The mean absolute deviation of a binomial count says how far an honest sample of this size strays in sum.
    honest = torch.sqrt(2 * expected * (1 - expected) / (torch.pi * num_draws)).sum()
    assert (counts / num_draws - expected).abs().sum() < 1.3 * honest + 1.5 / num_draws**0.5


@pytest.mark.parametrize("params", [each for each in DISTRIBUTIONS if each.get("top_p") != 0.0], ids=str)
def test_beams_draw_of_the_tokens_that_hugging_face_keeps(params):
    logits = torch.randn(V, generator=torch.Generator().manual_seed(4)) * 2
    expected = warped(logits, SamplingParams(**params), min_kept=2)
    scores, ids = kept_by_warpers(logits, SamplingParams(**params), min_kept=2)
    assert sorted(ids) == expected.nonzero()[:, 0].tolist()
    found = torch.softmax(torch.from_numpy(scores), dim=0)
    assert torch.allclose(found, expected[torch.from_numpy(ids)], atol=1e-6)


class _Always:
    def __init__(self, number: float) -> None:
        self._number = number

    def random(self) -> float:
        return self._number


@pytest.mark.parametrize("number", [0.0, 0.5, 1.0 - 2**-53])
@pytest.mark.parametrize("params", [{}, {"top_k": 10}, {"top_p": 0.9}, {"min_p": 0.1}, {"typical_p": 0.5}], ids=str)
def test_a_draw_never_falls_on_a_token_without_probability(number, params):
    logits = torch.full((V,), float("-inf"))
    logits[[5, 1500, 2998]] = torch.tensor([0.3, 0.2, 0.1])
    assert draw(logits, Head.of(logits, K), SamplingParams(**params), _Always(number)) in (5, 1500, 2998)


def outputs_of(logits: torch.Tensor) -> Outputs:
    top = torch.topk(logits, K)
    return Outputs(logits.clone(), top.values, top.indices)


def test_a_token_is_decided_by_the_sequence_alone():
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(7, V, generator=generator) * 2
    kinds = [
        {},
        {"top_p": 0.7},
        {"temperature": 0.0},
        {"top_k": 9},
        {"repetition_penalty": 1.3, "top_p": 0.9},
        {"logprobs": 3},
        {"temperature": 0.0, "frequency_penalty": 1.0},
    ]

    def sequences():
        found = [sequence((1, 2, 3), (5, 6), seed=i, **kind) for i, kind in enumerate(kinds)]
        for row, one in enumerate(found):
            one.row = row
        return found

    together = Sampler(CONFIG, Words()).sample(sequences(), outputs_of(logits))
    sampler = Sampler(CONFIG, Words())
    assert [sampler.sample([one], outputs_of(logits))[0] for one in sequences()] == together


TOKENS = st.lists(st.integers(0, 12), min_size=1, max_size=30)


@given(
    prompt=TOKENS,
    output=st.lists(st.integers(0, 12), max_size=30),
    penalty=st.sampled_from([1.0, 0.7, 1.4]),
    ngram=st.integers(0, 4),
    bad_words=st.lists(st.lists(st.integers(3, 12), min_size=1, max_size=3), max_size=3),
    biases=st.dictionaries(st.integers(0, 12), st.floats(-5, 5, width=32), max_size=4),
    min_tokens=st.integers(0, 40),
)
@settings(max_examples=150, deadline=None)
def test_processed_logits_equal_hugging_faces(prompt, output, penalty, ngram, bad_words, biases, min_tokens):
    params = {
        "repetition_penalty": penalty,
        "no_repeat_ngram_size": ngram,
        "bad_words": tuple(" ".join(map(str, ids)) for ids in bad_words),
        "logit_bias": tuple(biases.items()),
        "min_tokens": min_tokens,
        "max_tokens": 100,
    }
    one = sequence(prompt, output, **params)
    logits = torch.randn(V, generator=torch.Generator().manual_seed(1))
    processors = LogitsProcessorList()
    if biases:
        processors.append(SequenceBiasLogitsProcessor([[[i], float(bias)] for i, bias in biases.items()]))
    if penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(penalty))
    if ngram:
        processors.append(NoRepeatNGramLogitsProcessor(ngram))
    if bad_words:
        processors.append(NoBadWordsLogitsProcessor(bad_words))
    if min_tokens:
        processors.append(MinNewTokensLengthLogitsProcessor(len(prompt), min_tokens, EOS_ID))
    expected = processors(torch.tensor([[*prompt, *output]]), logits[None].clone())[0]
    found = logits.clone()
    history = TokenHistory(one.prompt_ids) if needs_history(one.params) else None
    LogitsProcessors(CONFIG, Words()).apply(found, one, history)
    torch.testing.assert_close(found, expected)


def test_presence_and_frequency_penalties_are_openais():
    logits = torch.randn(V, generator=torch.Generator().manual_seed(5))
    one = sequence((3, 4, 4), (7, 7, 9), presence_penalty=0.5, frequency_penalty=0.25)
    found = logits.clone()
    LogitsProcessors(CONFIG, Words()).apply(found, one, TokenHistory(one.prompt_ids))
    expected = logits.clone()
    expected[7] -= 0.5 + 2 * 0.25
    expected[9] -= 0.5 + 0.25
    torch.testing.assert_close(found, expected)


def test_only_allowed_tokens_are_left_and_a_text_that_may_not_go_on_ends():
    processors = LogitsProcessors(CONFIG, Words())
    logits = torch.randn(V)
    found = logits.clone()
    processors.apply(found, sequence(allowed_token_ids=(5, 9, 10**6)), None)
    assert torch.isfinite(found).nonzero()[:, 0].tolist() == [5, 9]
    assert torch.equal(found[[5, 9]], logits[[5, 9]])
    found = logits.clone()
    processors.apply(found, sequence(allowed_token_ids=(EOS_ID,), min_tokens=3), None)
    assert torch.isfinite(found).nonzero()[:, 0].tolist() == [EOS_ID]


@given(prompt=TOKENS, output=st.lists(st.integers(0, 200), max_size=200), cut=st.integers(0, 200))
def test_a_history_counts_whenever_it_is_told_and_forks_are_independent(prompt, output, cut):
    history = TokenHistory(prompt)
    history.update(output[:cut])
    fork = history.fork()
    fork.update([*output[:cut], 7, 7])
    history.update(output)
    assert history.tokens.tolist() == [*prompt, *output]
    counts = dict(zip(history.unique_ids.tolist(), history.output_counts.tolist(), strict=True))
    assert counts == {token_id: output.count(token_id) for token_id in {*prompt, *output}}
    assert fork.tokens.tolist() == [*prompt, *output[:cut], 7, 7]


def test_candidates_of_a_beam_are_the_best_log_probabilities():
    logits = torch.randn(2, V, generator=torch.Generator().manual_seed(6)) * 2
    for params, num in (({}, 8), ({}, 100), ({"repetition_penalty": 1.5}, 8)):
        beams = [sequence((1, 2), (5,), beam_width=2, temperature=0.0, **params) for _ in range(2)]
        beams[1].row = 1
        found = Sampler(CONFIG, Words()).beam_candidates(beams, num, outputs_of(logits))
        expected = torch.log_softmax(logits, dim=-1)
        if params:
            ids = torch.tensor([[1, 2, 5]] * 2)
            expected = RepetitionPenaltyLogitsProcessor(1.5)(ids, expected)
        for candidates, best in zip(found, torch.topk(expected, num).values, strict=True):
            assert [c.logprob for c in candidates] == pytest.approx(best.tolist(), abs=1e-5)
            assert len({c.token_id for c in candidates}) == num


def test_a_suppressed_token_that_has_all_the_mass_leaves_beams_their_candidates():
    logits = torch.randn(1, V, generator=torch.Generator().manual_seed(6))
    allowed = logits.clone()
    logits[0, 9], allowed[0, 9] = 500.0, -math.inf
    config = dataclasses.replace(CONFIG, suppressed_token_ids=(9,))
    top = torch.topk(allowed, K)
    beams = [sequence((1, 2), (5,), beam_width=2, temperature=0.0)]
    (found,) = Sampler(config, Words()).beam_candidates(beams, 4, Outputs(logits, top.values, top.indices))
    assert [c.token_id for c in found] == top.indices[0, :4].tolist()
    assert [c.logprob for c in found] == pytest.approx((top.values[0, :4] - 500).tolist(), rel=1e-5)


def test_beams_that_sample_draw_without_replacement_from_what_the_warpers_keep():
    logits = torch.randn(1, V, generator=torch.Generator().manual_seed(7)) * 3
    params = {"beam_width": 2, "do_sample": True, "temperature": 1.5, "top_k": 6}
    kept = set(torch.topk(logits[0], 6).indices.tolist())
    expected = torch.softmax(torch.log_softmax(logits, -1)[0] / 1.5, -1)
    first, num_draws = torch.zeros(V), 2000
    beam = sequence(seed=1, **params)
    sampler = Sampler(CONFIG, Words())
    for _ in range(num_draws):
        (candidates,) = sampler.beam_candidates([beam], 4, outputs_of(logits))
        assert len({c.token_id for c in candidates}) == 4 and {c.token_id for c in candidates} <= kept
        assert [c.key for c in candidates] == sorted((c.key for c in candidates), reverse=True)
        first[candidates[0].token_id] += 1
    masked = torch.where(torch.isin(torch.arange(V), torch.tensor(sorted(kept))), expected, 0.0)
    assert (first / num_draws - masked / masked.sum()).abs().max() < 0.04
