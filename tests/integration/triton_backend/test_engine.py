"""The engine against Hugging Face ``generate``, token for token, alone and in crowds; every way a request ends."""

from __future__ import annotations

import math
import random
import re
import threading
import time

import pytest
import torch

from triton_backend.engine import Stop
from triton_backend.errors import InvalidRequest
from triton_backend.loading import load_engine
from triton_backend.protocol import GenerateRequest
from triton_backend.sampling_params import SamplingParams

from .conftest import Answer, Client

pytestmark = pytest.mark.integration

PROMPTS = ["The import statement", "for number in", "Größe 🙂", "naïve café, 東京", "T", " and 𝒳"]


def random_prompt(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(1, 400), k=length)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_tokens_and_text_equal_generate(client, original, prompt):
    prompt_ids = client.tokenizer(prompt)["input_ids"]
    expected = original(prompt_ids, 40)
    output = client.ask(prompt, max_tokens=40).outputs[0]
    assert list(output.token_ids) == expected
    assert output.text == client.tokenizer.decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize("length", [1, 2, 3, 31, 200])
def test_prompts_of_any_length_equal_generate(client, original, length):
    prompt_ids = random_prompt(length, length)
    assert client.ids(prompt_ids, max_tokens=30) == original(prompt_ids, 30)


@pytest.mark.parametrize("options", [{"repetition_penalty": 1.7}, {"repetition_penalty": 0.8}])
def test_penalised_greedy_equals_generate(client, original, options):
    for seed in range(4):
        prompt_ids = random_prompt(seed, 9)
        assert client.ids(prompt_ids, max_tokens=30, **options) == original(prompt_ids, 30, **options)


def test_words_and_ngrams_that_are_forbidden_are_those_of_generate(client, original):
    for seed in range(4):
        prompt_ids = random_prompt(seed, 9)
        first = original(prompt_ids, 12)
        words = [client.tokenizer.decode([token_id]) for token_id in first[3:5]]
        ids = [client.tokenizer.encode(prefix + word) for word in words for prefix in ("", " ")]
        options = {"no_repeat_ngram_size": 2, "bad_words_ids": ids}
        expected = original(prompt_ids, 30, **options)
        found = client.ids(prompt_ids, max_tokens=30, no_repeat_ngram_size=2, bad_words=words)
        assert found == expected and expected[:12] != first


def test_a_prompt_of_special_tokens_only_is_a_prompt(client, original):
    for prompt, ids in (("<|endoftext|>", [0]), ("<|endoftext|>" * 7, [0] * 7)):
        assert client.ids(prompt, max_tokens=10, min_tokens=5) == original(ids, 10, min_new_tokens=5)


def test_min_tokens_equals_generate(client, original):
    for seed in range(4):
        prompt_ids = random_prompt(seed, 5)
        expected = original(prompt_ids, 40, min_new_tokens=25)
        assert client.ids(prompt_ids, max_tokens=40, min_tokens=25) == expected


def crowd(client, params_of):
    """Ask for many sequences of different lengths at once; returns their tokens in order."""
    answers = [client.submit(random_prompt(i, 1 + (i * 37) % 150), max_tokens=5 + i, **params_of(i)) for i in range(32)]
    return [list(answer.last().outputs[0].token_ids) for answer in answers]


@pytest.mark.exact
@pytest.mark.parametrize(
    "params_of",
    [
        lambda i: {"ignore_eos": True},
        lambda i: {"temperature": 1.0, "seed": i, "top_k": 20},
        lambda i: {"temperature": 0.8, "seed": i},
        lambda i: {"temperature": 1.2, "seed": i, "top_p": 0.9, "min_p": 0.01},
        lambda i: [{}, {"temperature": 1.0, "seed": i}, {"logprobs": 2}, {"frequency_penalty": 1.0}][i % 4],
    ],
    ids=["greedy", "top_k", "plain", "top_p", "mixed"],
)
def test_every_request_of_a_crowd_gets_the_tokens_it_gets_alone(client, params_of):
    together = crowd(client, params_of)
    for i, ids in enumerate(together):
        alone = client.ids(random_prompt(i, 1 + (i * 37) % 150), max_tokens=5 + i, **params_of(i))
        assert ids == alone, f"request {i}"


@pytest.mark.exact
def test_log_probabilities_are_bit_equal_alone_and_in_a_crowd(client):
    prompt = random_prompt(5, 150)
    alone = client.ask(prompt, max_tokens=20, logprobs=3, ignore_eos=True).outputs[0].logprobs
    crowd_answers = [client.submit(random_prompt(i, 20 + i), max_tokens=40, ignore_eos=True) for i in range(7)]
    together = client.ask(prompt, max_tokens=20, logprobs=3, ignore_eos=True).outputs[0].logprobs
    for answer in crowd_answers:
        answer.last()
    assert together == alone


def test_log_probabilities_equal_the_original_model(client, original):
    prompt_ids = random_prompt(3, 12)
    output = client.ask(prompt_ids, max_tokens=10, logprobs=5, ignore_eos=True).outputs[0]
    with torch.inference_mode():
        logits = original.model(torch.tensor([[*prompt_ids, *output.token_ids]])).logits[0, len(prompt_ids) - 1 : -1]
    expected = torch.log_softmax(logits, dim=-1)
    total = 0.0
    for token_id, alternatives, row in zip(output.token_ids, output.logprobs, expected, strict=True):
        assert alternatives[0].token_id == token_id
        assert alternatives[0].rank == 1 + int((row > row[token_id]).sum())
        assert {a.token_id for a in alternatives} == set(row.topk(5).indices.tolist())
        for alternative in alternatives:
            assert math.isclose(alternative.logprob, row[alternative.token_id], abs_tol=1e-3)
        total += alternatives[0].logprob
    assert math.isclose(output.cumulative_logprob, total, rel_tol=1e-6)


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others(client):
    options = {"max_tokens": 30, "temperature": 1.0, "ignore_eos": True}
    first, again, other = (client.ids("The", seed=seed, **options) for seed in (7, 7, 8))
    assert first == again != other
    assert client.ids("The", **options) != client.ids("The", **options)


def test_n_sequences_share_one_prompt_and_differ_unless_greedy(client, original):
    prompt_ids = random_prompt(1, 40)
    outputs = client.ask(prompt_ids, max_tokens=20, n=4, temperature=1.0, seed=3, ignore_eos=True).outputs
    assert [output.index for output in outputs] == [0, 1, 2, 3]
    assert len({output.token_ids for output in outputs}) == 4
    assert list(outputs[0].token_ids) == client.ids(prompt_ids, max_tokens=20, temperature=1.0, seed=3, ignore_eos=True)
    greedy = client.ask(prompt_ids, max_tokens=20, n=3).outputs
    assert all(list(output.token_ids) == original(prompt_ids, 20) for output in greedy)


def test_sequences_of_one_request_may_end_at_different_times(client):
    outputs = client.ask("The", max_tokens=60, n=6, temperature=1.5, seed=1, stop=["a", "e"]).outputs
    assert len({len(output.token_ids) for output in outputs}) > 1
    assert all(output.finish_reason in ("stop", "length") for output in outputs)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_deltas_joined_are_the_whole_text_and_never_break_a_character(client, prompt):
    options = {"max_tokens": 60, "temperature": 1.5, "seed": 11, "ignore_eos": True}
    whole = client.ask(prompt, **options).outputs[0]
    responses = list(client.submit(prompt, stream=True, **options))
    deltas = [response.outputs[0].text for response in responses]
    assert "".join(deltas) == whole.text == client.tokenizer.decode(whole.token_ids, skip_special_tokens=True)
    assert [i for response in responses for i in response.outputs[0].token_ids] == list(whole.token_ids)
    assert [response.finished for response in responses] == [False] * (len(responses) - 1) + [True]
    assert responses[-1].outputs[0].finish_reason == "length"


def test_tokens_that_come_while_a_response_waits_to_be_sent_are_sent_together(client, monkeypatch):
    options = {"max_tokens": 60, "temperature": 1.5, "seed": 11, "ignore_eos": True}
    whole = client.ask("The", **options).outputs[0]
    monkeypatch.setattr(Answer, "behind", True)
    first, last = client.submit("The", stream=True, **options)
    assert first.outputs[0].text + last.outputs[0].text == whole.text
    assert first.outputs[0].token_ids == whole.token_ids[:1] and last.outputs[0].token_ids == whole.token_ids[1:]


def test_a_character_split_over_tokens_arrives_whole(client):
    tokenizer = client.engine._tokenizer
    for text in ("👩‍👩‍👧 東京 Ελλάδα 𝒳 e\u0301 🙂", "plain", "\x00\x7f"):
        ids = tokenizer.encode(text)
        stream = tokenizer.stream(skip_special_tokens=True)
        deltas = [stream.append(token_id) for token_id in ids]
        assert "".join(deltas) + stream.flush() == text
        assert "\ufffd" not in "".join(deltas)


def test_an_unfinished_character_at_the_end_reads_as_generate_decodes_it(client):
    tokenizer = client.engine._tokenizer
    ids = tokenizer.encode("ok 🙂")[:-1]
    stream = tokenizer.stream(skip_special_tokens=True)
    joined = "".join(stream.append(token_id) for token_id in ids) + stream.flush()
    assert joined == client.tokenizer.decode(ids)


def whole_text(client, **options):
    return client.ask("The import", max_tokens=60, ignore_eos=True, **options).outputs[0].text


def test_a_stop_string_ends_the_text_before_it_and_is_never_shown_in_a_stream(client):
    text = whole_text(client)
    stop = text[20:27]
    expected = text[: text.index(stop)]
    for stream in (False, True):
        answer = client.submit("The import", stream=stream, max_tokens=60, ignore_eos=True, stop=[stop, "zzzzzz"])
        responses = list(answer)
        assert "".join(response.outputs[0].text for response in responses) == expected
        assert responses[-1].outputs[0].finish_reason == "stop"
    assert whole_text(client, stop=[stop], include_stop_str_in_output=True) == expected + stop


def test_a_near_miss_of_a_stop_string_is_shown_in_the_end(client):
    text = whole_text(client)
    assert whole_text(client, stop=[text[-3:] + "!", text[10:14] + "\0"]) == text


def test_a_stop_token_ends_the_sequence_and_is_not_in_the_text(client, original):
    ids = original(client.tokenizer("The import")["input_ids"], 30)
    stop_id = ids[12]
    output = client.ask("The import", max_tokens=30, stop_token_ids=[stop_id, 10**6]).outputs[0]
    end = ids.index(stop_id)
    assert list(output.token_ids) == ids[: end + 1]
    assert output.text == client.tokenizer.decode(ids[:end])
    assert output.finish_reason == "stop"


def test_generation_ends_with_length_at_the_models_context(client):
    output = client.ask(random_prompt(2, 250), max_tokens=50, ignore_eos=True).outputs[0]
    assert len(output.token_ids) == 6
    assert output.finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "params", "said"),
    [
        ([5] * 256, {}, "the prompt has 256 tokens, but the model's context is 256 tokens"),
        ("", {}, "the prompt is empty"),
        ([], {}, "the prompt is empty"),
        ([10**6], {}, "input_ids has value 1000000; expected token ids from 0 to "),
        ([-1], {}, "input_ids has value -1"),
        ("x", {"n": 9}, "n has value 9; this model runs at most 8 sequences"),
        ("x", {"allowed_token_ids": [5, 10**6]}, "allowed_token_ids has value 1000000; expected token ids from 0 to "),
        ("x", {"logit_bias": {"999999": 1.0}}, "logit_bias has value 999999; expected token ids from 0 to "),
    ],
)
def test_a_request_that_can_never_succeed_is_refused_at_once(client, prompt, params, said):
    with pytest.raises(InvalidRequest) as caught:
        client.ask(prompt, **params)
    assert said in str(caught.value)


LONG = {"max_tokens": 250, "ignore_eos": True}


def test_a_cancelled_request_frees_its_row_within_100_ms(client):
    answer = client.submit("The", stream=True, **LONG)
    responses = iter(answer)
    next(responses)
    answer.gone = True
    cancelled_s = time.monotonic()
    last = list(responses)[-1]
    assert last.error == "CANCELLED: the client cancelled the request"
    while client.engine._scheduler.num_running:
        time.sleep(0.001)
    assert time.monotonic() - cancelled_s < 0.1


def test_a_request_cancelled_while_it_waits_never_runs(client):
    running = [client.submit("The", **LONG) for _ in range(8)]
    waiting = client.submit("The", max_tokens=1)
    waiting.gone = True
    last = waiting.last()
    assert last.error is not None or last.outputs  # it may have been first in line for a freed row
    for answer in running:
        assert answer.last().error is None


def test_a_deadline_ends_a_request_with_an_error(client):
    assert client.ask("The", timeout_ms=1, **LONG).error == "CANCELLED: timeout_ms = 1 has passed"


def test_a_full_queue_refuses_at_once_and_everyone_accepted_finishes(client, version):
    answers = [client.submit("The", max_tokens=30, ignore_eos=True) for _ in range(8 + 256 + 50)]
    errors = [answer.last().error for answer in answers]
    refused = [error for error in errors if error is not None]
    told = re.compile(r"UNAVAILABLE: \d+ requests are waiting already \(max_queue_size = 256\)")
    assert refused and all(told.match(error) for error in refused)
    assert errors.count(None) >= 256


def test_a_health_probe_is_answered_while_all_rows_and_the_queue_are_taken(client):
    crowd = [client.submit("The", **LONG) for _ in range(40)]
    probe = Answer()
    client.engine.submit(
        GenerateRequest("p", SamplingParams(max_tokens=1, temperature=0.0), input_ids=(0,), health_probe=True), probe
    )
    started_s = time.monotonic()
    response = probe.last()
    assert response.error is None and len(response.outputs[0].token_ids) == 1
    assert response.metrics["engine_uptime_s"] > 0
    assert 0 <= response.metrics["queue_s"] < 1 and 0 <= response.metrics["prefill_s"] < 1
    assert time.monotonic() - started_s < 1
    assert client.engine._scheduler.has_work, "the crowd was still running"
    for answer in crowd:
        answer.gone = True
    for answer in crowd:
        answer.last()


def test_an_engine_that_is_stopped_while_a_step_fails_stops(version, checkpoint, monkeypatch):
    engine, _ = load_engine(version)
    entered, may_fail = threading.Event(), threading.Event()

    def broken(*args, **kwargs):
        entered.set()
        may_fail.wait(10)
        raise RuntimeError("no memory")

    monkeypatch.setattr(engine._runner, "decode", broken)
    answer = Client(engine, None).submit([5, 6, 7], max_tokens=9, ignore_eos=True)
    assert entered.wait(10)
    stopping = threading.Thread(target=engine.stop)
    stopping.start()
    may_fail.set()
    stopping.join(10)
    assert not stopping.is_alive()
    assert "no memory" in answer.last().error


def test_an_engine_that_cannot_even_free_rows_answers_everybody_and_whoever_comes(version, monkeypatch):
    """As after an error of the device that stays."""
    engine, _ = load_engine(version)
    client = Client(engine, None)

    def broken(*args, **kwargs):
        raise RuntimeError("device lost")

    for name in ("decode", "free_row"):
        monkeypatch.setattr(engine._runner, name, broken)
    answers = [client.submit([5, i], max_tokens=9, ignore_eos=True) for i in range(20)]
    answers.append(client.submit([9], max_tokens=1))
    for answer in answers:
        error = answer.last().error
        # No code of an engine that is alive: a probe must fail.
        assert error == "INTERNAL: the engine cannot go on: device lost; it must be loaded again", error
    engine.stop()
    assert not engine._thread.is_alive()


@pytest.mark.parametrize("is_failing", [False, True])
def test_an_engine_that_breaks_while_it_is_stopped_stops_and_answers_everybody(version, monkeypatch, is_failing):
    engine, _ = load_engine(version, is_started=False)
    client = Client(engine, None)

    def broken(*args, **kwargs):
        raise RuntimeError("device lost")

    answers = [client.submit([5, i], max_tokens=200, ignore_eos=True) for i in range(3)]
    engine._receive()
    for _ in range(3):
        engine.step()
    monkeypatch.setattr(engine._runner, "free_row", broken)
    monkeypatch.setattr(engine._runner, "warm_up", lambda: None)
    answers[0].gone = is_failing
    engine._inbox.put(Stop())
    answers.append(client.submit([9], max_tokens=1))
    engine.start()
    engine._thread.join(10)
    assert not engine._thread.is_alive()
    assert all(answer.last().error for answer in answers)


def test_a_request_that_cannot_be_taken_is_answered_and_nobody_else_fails(client, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no memory")

    running = client.submit("The", stream=True, **LONG)
    next(iter(running))
    with monkeypatch.context() as patch:
        patch.setattr("triton_backend.engine.RequestOutput", broken)
        error = client.ask("The", max_tokens=3).error
    assert error == "INTERNAL: the engine failed while it took this request: no memory"
    assert running.last().error is None


def test_a_failing_step_fails_its_requests_and_the_engine_goes_on(client, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(client.engine._runner, "decode", broken)
        assert "INTERNAL: the engine failed while computing this request: no memory" in client.ask("The", **LONG).error
    assert client.ask("The", max_tokens=3).error is None
