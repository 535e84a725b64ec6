"""The rules of beam search against Hugging Face ``generate`` and, for groups, against a search over everything."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from triton_backend.beam_search import BeamSearch, Candidate
from triton_backend.sampling_params import SamplingParams

pytestmark = pytest.mark.integration

V = 24


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        initializer_range=0.5,
        eos_token_id=0,
        bos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def logprobs_of(model, texts: list[list[int]]) -> torch.Tensor:
    """(B, V), computed anew for every text."""
    with torch.inference_mode():
        return torch.log_softmax(model(torch.tensor(texts)).logits[:, -1], dim=-1)


def search(model, prompt: list[int], params: SamplingParams, ends: list[int], max_new_tokens: int) -> BeamSearch:
    """The whole search, with every forward pass from the beginning."""
    found, texts = BeamSearch(params, frozenset(ends), max_new_tokens), [prompt]
    while not found.is_finished:
        candidates = []
        for row in logprobs_of(model, texts):
            best = torch.topk(row, min(V, found.num_candidates))
            pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            candidates.append([Candidate(token_id, value, value) for token_id, value in pairs])
        extensions = found.advance(candidates, lambda parent, token_id: False)
        texts = [[*texts[extension.parent], extension.token_id] for extension in extensions]
    return found


OPTIONS = list(itertools.product([False, True, "never"], [-1.0, 0.0, 0.5, 1.0, 2.0], [1, 2, 8, 25]))


@pytest.mark.parametrize(("early_stopping", "length_penalty", "max_new_tokens"), OPTIONS)
def test_hypotheses_equal_generate(model, early_stopping, length_penalty, max_new_tokens):
    draw = random.Random(str((early_stopping, length_penalty, max_new_tokens)))
    for width, ends in ((2, [0]), (draw.choice([3, 4, 6]), draw.choice([[0, 5], [0, 3, 7]]))):
        prompt = draw.choices(range(1, V), k=draw.randint(1, 6))
        with torch.inference_mode():
            expected = model.generate(
                torch.tensor([prompt]),
                num_beams=width,
                num_return_sequences=width,
                max_new_tokens=max_new_tokens,
                early_stopping=early_stopping,
                length_penalty=length_penalty,
                eos_token_id=ends,
                pad_token_id=0,
                do_sample=False,
                output_scores=True,
                return_dict_in_generate=True,
            )
        params = SamplingParams(beam_width=width, early_stopping=early_stopping, length_penalty=length_penalty)
        found = search(model, prompt, params, ends, max_new_tokens).best(width)
        texts = [until_end(ids[len(prompt) :], ends) for ids in expected.sequences.tolist()]
        assert [list(hypothesis.token_ids) for hypothesis in found] == texts
        assert [h.score for h in found] == pytest.approx(expected.sequences_scores.tolist(), rel=1e-5, abs=1e-4)


def until_end(ids: list[int], ends: list[int]) -> list[int]:
    return next((ids[: place + 1] for place, token_id in enumerate(ids) if token_id in ends), ids)


@pytest.mark.parametrize("diversity_penalty", [0.3, 2.0, 50.0])
@pytest.mark.parametrize(("width", "num_groups"), [(4, 2), (6, 3), (3, 3)])
def test_groups_equal_a_search_over_the_whole_vocabulary(model, width, num_groups, diversity_penalty):
    num_new, size = 7, width // num_groups
    params = SamplingParams(beam_width=width, num_beam_groups=num_groups, diversity_penalty=diversity_penalty)
    for seed in range(4):
        prompt = random.Random(seed).choices(range(1, V), k=4)
        groups = [[(0.0, prompt)] for _ in range(num_groups)]
        for _ in range(num_new):
            chosen: list[int] = []
            for index, group in enumerate(groups):
                rows = logprobs_of(model, [text for _, text in group])
                options = [
                    (score + float(row[token_id]) - diversity_penalty * chosen.count(token_id), [*text, token_id])
                    for (score, text), row in zip(group, rows, strict=True)
                    for token_id in range(V)
                ]
                groups[index] = sorted(options, key=lambda option: -option[0])[:size]
                chosen += [text[-1] for _, text in groups[index]]
        expected = sorted(itertools.chain(*groups), key=lambda option: -option[0])
        found = search(model, prompt, params, [], num_new).best(width)
        assert [list(h.token_ids) for h in found] == [text[len(prompt) :] for _, text in expected]
        assert [h.cumulative_logprob for h in found] == pytest.approx([score for score, _ in expected], abs=1e-4)


@given(
    seed=st.integers(0, 10**6),
    width=st.integers(2, 5),
    num_new=st.integers(1, 6),
    num_allowed=st.integers(1, 6),
    early_stopping=st.sampled_from([False, True, "never"]),
)
@settings(max_examples=200, deadline=None)
def test_whatever_may_follow_the_search_ends_with_different_sorted_hypotheses(
    seed, width, num_new, num_allowed, early_stopping
):
    draw = random.Random(seed)
    found = BeamSearch(SamplingParams(beam_width=width, early_stopping=early_stopping), frozenset([0]), num_new)
    num_beams = 1
    for _ in range(num_new):
        if found.is_finished:
            break
        candidates = []
        for _ in range(num_beams):
            values = sorted((-draw.random() * 5 for _ in range(num_allowed)), reverse=True)
            ids = draw.sample(range(6), num_allowed)
            candidates.append([Candidate(i, value, value) for i, value in zip(ids, values, strict=True)])
        extensions = found.advance(candidates, lambda parent, token_id: draw.random() < 0.1)
        num_beams = len(extensions)
        assert num_beams <= width and all(0 <= e.parent < len(candidates) for e in extensions)
    assert found.is_finished
    best = found.best(width)
    assert 1 <= len(best) <= width
    assert [h.score for h in best] == sorted((h.score for h in best), reverse=True)
    assert len({h.token_ids for h in best}) == len(best)
    assert all(1 <= len(h.token_ids) <= num_new and 0 not in h.token_ids[:-1] for h in best)
