"""Beam search through the engine against Hugging Face ``generate``: the same tokens, alone and in company."""

from __future__ import annotations

import random
import re

import pytest
import torch

from triton_backend.errors import InvalidRequest

pytestmark = pytest.mark.integration


def random_prompt(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(1, 400), k=length)


@pytest.fixture(scope="module")
def beams_of(original):
    """``generate``'s beams: prompt ids, options → [(new ids, score)], best first."""

    def generate(prompt_ids, num_beams, max_new_tokens, num_return_sequences=1, **options):
        with torch.inference_mode():
            found = original.model.generate(
                torch.tensor([prompt_ids]),
                num_beams=num_beams,
                max_new_tokens=max_new_tokens,
                num_return_sequences=num_return_sequences,
                do_sample=False,
                pad_token_id=0,
                output_scores=True,
                return_dict_in_generate=True,
                **options,
            )
        texts = [ids[len(prompt_ids) :] for ids in found.sequences.tolist()]
        return [(until_end(ids), score) for ids, score in zip(texts, found.sequences_scores.tolist(), strict=True)]

    return generate


def until_end(ids: list[int]) -> list[int]:
    """Without what ``generate`` pads with: this model's end token is 0, and so is its padding."""
    return ids[: ids.index(0) + 1] if 0 in ids else ids


def beams(client, prompt_ids, **params):
    response = client.ask(prompt_ids, **params)
    assert response.error is None, response.error
    return [(list(output.token_ids), output.score) for output in response.outputs]


def same(found, expected):
    assert [ids for ids, _ in found] == [ids for ids, _ in expected]
    assert [score for _, score in found] == pytest.approx([score for _, score in expected], rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("width", [2, 3, 4, 8])
@pytest.mark.parametrize("early_stopping", [False, True, "never"])
def test_beams_equal_generate(client, beams_of, width, early_stopping):
    for seed in range(3):
        prompt_ids = random_prompt(seed, 3 + 20 * seed)
        expected = beams_of(prompt_ids, width, 30, num_return_sequences=width, early_stopping=early_stopping)
        found = beams(client, prompt_ids, beam_width=width, n=width, max_tokens=30, early_stopping=early_stopping)
        same(found, expected)


@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 0.5, 2.0])
def test_length_penalty_equals_generate(client, beams_of, length_penalty):
    for seed in range(4):
        prompt_ids = random_prompt(seed, 7)
        expected = beams_of(prompt_ids, 4, 40, num_return_sequences=2, length_penalty=length_penalty)
        same(beams(client, prompt_ids, beam_width=4, n=2, max_tokens=40, length_penalty=length_penalty), expected)


@pytest.mark.parametrize(
    ("params", "options"),
    [
        ({"repetition_penalty": 1.5}, {"repetition_penalty": 1.5}),
        ({"no_repeat_ngram_size": 2}, {"no_repeat_ngram_size": 2}),
        ({"min_tokens": 12}, {"min_new_tokens": 12}),
        ({"bad_words": ["e", "o", "for"]}, {}),
        ({"logit_bias": {5: 3.0, 9: -4.0}}, {"sequence_bias": {(5,): 3.0, (9,): -4.0}}),
    ],
    ids=["repetition_penalty", "no_repeat_ngram_size", "min_tokens", "bad_words", "logit_bias"],
)
def test_processors_within_beams_equal_generate(client, beams_of, params, options):
    if "bad_words" in params:
        encode = client.tokenizer.encode
        options = {"bad_words_ids": [encode(start + word) for word in params["bad_words"] for start in ("", " ")]}
    for seed in range(3):
        prompt_ids = random_prompt(seed, 9)
        expected = beams_of(prompt_ids, 4, 25, num_return_sequences=4, **options)
        same(beams(client, prompt_ids, beam_width=4, n=4, max_tokens=25, **params), expected)


def test_beams_at_the_end_of_the_context(client, beams_of):
    prompt_ids = random_prompt(3, 250)
    same(beams(client, prompt_ids, beam_width=4, n=4, max_tokens=50), beams_of(prompt_ids, 4, 6, 4))


def test_beams_beside_streams_and_other_beams_equal_beams_alone(client, beams_of):
    widths = [2, 4, 3, 8, 2, 5]
    others = [client.submit(random_prompt(90 + i, 30), max_tokens=60, ignore_eos=True) for i in range(4)]
    answers = [
        client.submit(random_prompt(i, 5 + 11 * i), beam_width=width, n=width, max_tokens=12 + 3 * i)
        for i, width in enumerate(widths)
    ]
    for i, width in enumerate(widths):
        outputs = answers[i].last().outputs
        expected = beams_of(random_prompt(i, 5 + 11 * i), width, 12 + 3 * i, width)
        same([(list(output.token_ids), output.score) for output in outputs], expected)
    for i, answer in enumerate(others):
        ids = list(answer.last().outputs[0].token_ids)
        assert ids == client.ids(random_prompt(90 + i, 30), max_tokens=60, ignore_eos=True)


def test_beams_end_at_stop_strings_as_in_generate(client, beams_of):
    num_stopped = 0
    for seed in range(8):
        prompt_ids = random_prompt(seed, 9)
        text = client.ask(prompt_ids, beam_width=4, max_tokens=20).outputs[0].text
        stop = re.search("[a-z]{1,2}", text).group()
        options = {"num_return_sequences": 4, "early_stopping": True, "stop_strings": [stop]}
        expected = beams_of(prompt_ids, 4, 20, tokenizer=client.tokenizer, **options)
        outputs = client.ask(prompt_ids, beam_width=4, n=4, max_tokens=20, early_stopping=True, stop=[stop]).outputs
        same(
            [([i for i in output.token_ids if i], output.score) for output in outputs],
            [([i for i in ids if i], score) for ids, score in expected],  # padding is the end token, too
        )
        assert all(stop not in output.text for output in outputs)
        num_stopped += sum(output.finish_reason == "stop" for output in outputs)
    assert num_stopped > 6


def test_a_stop_string_that_was_complete_before_min_tokens_ends_no_beam(client, tokenizer):
    for seed in range(4):
        options = {"beam_width": 2, "max_tokens": 40, "ignore_eos": True}
        text = client.ask(random_prompt(seed, 9), **options).outputs[0].text
        stop = re.search("[a-z]", text).group()
        output = client.ask(random_prompt(seed, 9), min_tokens=15, stop=[stop], **options).outputs[0]
        whole = tokenizer.decode(output.token_ids, skip_special_tokens=True)
        assert whole.startswith(output.text) and len(output.token_ids) > 15
        is_cut = whole[len(output.text) :].startswith(stop)
        assert (output.finish_reason, len(output.token_ids)) == ("length", 40) or is_cut


def test_beams_end_at_stop_tokens_as_at_end_tokens(client, beams_of):
    prompt_ids = random_prompt(1, 9)
    stop_id = client.ask(prompt_ids, beam_width=4, max_tokens=20).outputs[0].token_ids[5]
    expected = beams_of(prompt_ids, 4, 20, num_return_sequences=4, eos_token_id=[0, stop_id])
    outputs = client.ask(prompt_ids, beam_width=4, n=4, max_tokens=20, stop_token_ids=[stop_id]).outputs
    same(
        [(list(output.token_ids), output.score) for output in outputs], [(cut(ids, stop_id), s) for ids, s in expected]
    )


def cut(ids: list[int], end_id: int) -> list[int]:
    return ids[: ids.index(end_id) + 1] if end_id in ids else ids


def test_a_stream_of_beams_is_one_response_with_the_texts(client):
    prompt_ids = random_prompt(2, 9)
    whole = client.ask(prompt_ids, beam_width=3, n=2, max_tokens=15)
    streamed = list(client.submit(prompt_ids, stream=True, beam_width=3, n=2, max_tokens=15))
    assert len(streamed) == 1 and streamed[0].finished
    assert streamed[0].outputs == whole.outputs
    assert [output.text for output in whole.outputs] == [
        client.tokenizer.decode(output.token_ids, skip_special_tokens=True) for output in whole.outputs
    ]


def test_log_probabilities_of_a_beam_are_the_models_own(client, original):
    prompt_ids = random_prompt(4, 12)
    for output in client.ask(prompt_ids, beam_width=3, n=3, max_tokens=10, logprobs=0, ignore_eos=True).outputs:
        with torch.inference_mode():
            logits = original.model(torch.tensor([[*prompt_ids, *output.token_ids]])).logits[
                0, len(prompt_ids) - 1 : -1
            ]
        expected = torch.log_softmax(logits, dim=-1).gather(1, torch.tensor(output.token_ids)[:, None])[:, 0]
        assert [alternatives[0].token_id for alternatives in output.logprobs] == list(output.token_ids)
        assert [alternatives[0].logprob for alternatives in output.logprobs] == pytest.approx(
            expected.tolist(), abs=1e-3
        )
        assert output.cumulative_logprob == pytest.approx(float(expected.sum()), abs=1e-3)


def test_sampled_beams_follow_their_seed(client):
    options = {"beam_width": 3, "n": 3, "max_tokens": 12, "do_sample": True, "temperature": 1.5}
    first, again, other = (client.ask([5, 6, 7], seed=seed, **options).outputs for seed in (1, 1, 2))
    assert first == again != other


def test_beams_drawn_at_the_smallest_temperature_have_texts(client):
    options = {"beam_width": 3, "n": 3, "max_tokens": 6, "do_sample": True, "temperature": 1e-40, "seed": 1}
    outputs = client.ask([5, 6, 7], ignore_eos=True, **options).outputs
    assert [len(output.token_ids) for output in outputs] == [6, 6, 6]


def test_groups_of_beams_differ_from_each_other(client):
    prompt_ids = random_prompt(6, 9)
    outputs = client.ask(
        prompt_ids, beam_width=6, num_beam_groups=3, diversity_penalty=5.0, n=6, max_tokens=8, ignore_eos=True
    ).outputs
    assert len({output.token_ids[0] for output in outputs}) == 3


def test_wider_beams_than_rows_are_refused(client):
    with pytest.raises(InvalidRequest, match="beam_width has value 9; this model runs at most 8 sequences"):
        client.ask([5], beam_width=9)


def test_a_cancelled_beam_search_frees_its_rows(client):
    answer = client.submit([5, 6], beam_width=8, max_tokens=250, ignore_eos=True)
    answer.gone = True
    assert answer.last().error == "CANCELLED: the client cancelled the request"
