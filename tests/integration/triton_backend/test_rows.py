"""What happens to cache rows never shows in the answers, to the last bit: prefixes, preemption, chunks, drafts."""

from __future__ import annotations

import dataclasses
import random
import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

from triton_backend.config import VersionConfig
from triton_backend.loading import load_engine
from triton_backend.model_runner import ModelRunner
from triton_backend.protocol import GenerateRequest
from triton_backend.sampling_params import SamplingParams
from triton_backend.speculator import Speculator

from .conftest import Answer, Client

pytestmark = [pytest.mark.integration, pytest.mark.exact]


def prompt_of(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(1, 400), k=length)


def engine_with(version, folder, is_started=True, **settings):
    shutil.copytree(version, folder)
    config = VersionConfig.read(version)
    VersionConfig(config.model, dataclasses.replace(config.engine, **settings)).write(folder)
    engine, _ = load_engine(folder, is_sealed=False, is_started=is_started)
    return engine


@pytest.fixture
def client_with(version, checkpoint, tmp_path):
    """A client of an engine with other settings than the usual one."""
    engines = []

    def make(is_started: bool = True, **settings) -> Client:
        engines.append(engine_with(version, tmp_path / str(len(engines)), is_started, **settings))
        return Client(engines[-1], AutoTokenizer.from_pretrained(checkpoint))

    yield make
    for engine in engines:
        if engine._thread.is_alive():
            engine.stop()


SYSTEM = prompt_of(1000, 90)
EXACT = {"max_tokens": 12, "logprobs": 2, "ignore_eos": True}


def conversations() -> list[list[int]]:
    return [SYSTEM[: 90 - 7 * (i % 3)] + prompt_of(i, 2 + i * 3) for i in range(12)]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 5}], ids=["greedy", "seeded"])
def test_shared_prefixes_give_the_bits_that_computing_gives(client_with, sampling):
    cold, warm = client_with(enable_prefix_caching=False), client_with()
    expected = [cold.ask(prompt, **EXACT, **sampling).outputs for prompt in conversations()]
    for _ in range(2):
        answers = [warm.submit(prompt, **EXACT, **sampling) for prompt in conversations()]
        responses = [answer.last() for answer in answers]
        assert [response.outputs for response in responses] == expected
    assert all(response.metrics["cached_tokens"] >= 64 for response in responses)
    assert cold.ask(conversations()[0], **EXACT).metrics["cached_tokens"] == 0


def test_the_last_answer_of_a_conversation_is_not_shared_unless_asked_for(client_with):
    for deterministic, expected in ((True, 40), (False, 59)):
        client = client_with(deterministic=deterministic)
        prompt = prompt_of(3, 40)
        answer = list(client.ask(prompt, max_tokens=20, ignore_eos=True).outputs[0].token_ids)
        assert client.ask(prompt, max_tokens=1).metrics["cached_tokens"] == 39
        cached = client.ask([*prompt, *answer, 5, 6], max_tokens=1).metrics["cached_tokens"]
        assert cached == expected


@pytest.mark.parametrize("budget", [9, 17, 33, 64, 512])
def test_chunks_of_any_size_give_the_same_bits(client_with, client, budget):
    prompts = [prompt_of(i, length) for i, length in enumerate((1, 2, 3, 50, 200, 13))]
    expected = [client.ask(prompt, **EXACT).outputs for prompt in prompts]
    other = client_with(
        max_num_batched_tokens=budget, long_prefill_token_threshold=min(budget, 33), enable_prefix_caching=False
    )
    answers = [other.submit(prompt, **EXACT) for prompt in prompts]
    assert [answer.last().outputs for answer in answers] == expected


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 1.0, "seed": 3}, {"n": 2, "temperature": 1.0, "seed": 3}, {"beam_width": 3, "n": 3}],
    ids=["greedy", "seeded", "n", "beams"],
)
def test_a_preempted_request_goes_on_with_the_same_bits(client_with, options):
    client = client_with(max_num_seqs=4, max_num_batched_tokens=40)
    extra = {} if "beam_width" in options else {"logprobs": 1}
    patient = {"max_tokens": 60, "ignore_eos": True, "priority": 5, **extra, **options}
    expected = [client.ask(prompt_of(i, 30 + i), **patient).outputs for i in range(3)]
    answers = [client.submit(prompt_of(i, 30 + i), **patient) for i in range(3)]
    urgent = []
    while not any(answer.num_finals for answer in answers) and len(urgent) < 30:
        urgent.append(client.submit(prompt_of(99, 20), max_tokens=4, priority=0, n=2, temperature=0.0, ignore_eos=True))
        urgent[-1].last()
    responses = [answer.last() for answer in answers]
    assert [response.outputs for response in responses] == expected
    assert sum(response.metrics["preemptions"] for response in responses) > 0


def test_urgent_requests_go_first_and_the_patient_ones_are_served_in_the_end(client_with):
    client = client_with(is_started=False, max_num_seqs=1, max_num_batched_tokens=40)
    engine, order = client.engine, []

    class Noting(Answer):
        def __init__(self, priority):
            super().__init__()
            self.priority = priority

        def send(self, response):
            super().send(response)
            order.append(self.priority)

    def arrive(priority, max_tokens):
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, priority=priority)
        answer = Noting(priority)
        engine.accept(engine.prepare(GenerateRequest("r", params, input_ids=(5, 6)), answer))
        return answer

    first = arrive(9, 40)
    for _ in range(3):
        engine.step()
    for priority in (3, 1, 2, 1):
        arrive(priority, 2)
    while engine._scheduler.has_work:
        engine.step()
    assert order == [1, 1, 2, 3, 9]
    assert first.last().metrics["preemptions"] == 1


def test_drafted_tokens_never_change_a_greedy_answer(client_with, client):
    drafting = client_with(deterministic=False, num_speculative_tokens=5)
    accepted = 0
    for seed in range(12):
        pattern = prompt_of(seed, 6)
        for prompt in (pattern * 8, pattern * 3 + prompt_of(seed + 50, 30)):
            expected = client.ask(prompt, max_tokens=60)
            found = drafting.ask(prompt, max_tokens=60)
            assert [o.token_ids for o in found.outputs] == [o.token_ids for o in expected.outputs]
            assert [o.text for o in found.outputs] == [o.text for o in expected.outputs]
            accepted += found.metrics["accepted_draft_tokens"]
    assert accepted > 0


@pytest.mark.parametrize("num_left", [1, 2, 15, 16, 17, 18, 33])
def test_drafts_end_where_the_context_does(version, num_left):
    config = VersionConfig.read(version)
    engine = dataclasses.replace(config.engine, deterministic=False, num_speculative_tokens=32)
    config = VersionConfig(config.model, engine)
    runner = ModelRunner(version, config)
    tokens = prompt_of(1, 90) * 3
    prompt, output = tokens[: engine.max_model_len - num_left - 1], [tokens[engine.max_model_len - num_left - 1]]
    runner.prefill(0, prompt, 0, want_logits=False)
    state = SimpleNamespace(num_draft_tokens=0, num_accepted_tokens=0)
    sequence = SimpleNamespace(row=0, prompt_ids=prompt, output_ids=output, num_tokens=len(prompt) + 1, state=state)
    Speculator(config, runner).propose(sequence)
    assert state.num_draft_tokens == min(32, num_left - 1)


def test_log_probabilities_of_a_prompt_are_those_of_the_original(client, original):
    prompt = prompt_of(8, 150)
    response = client.ask(prompt, max_tokens=1, prompt_logprobs=2)
    with torch.inference_mode():
        expected = torch.log_softmax(original.model(torch.tensor([prompt])).logits[0], dim=-1)
    first, *others = response.prompt_logprobs
    assert first is None and len(others) == len(prompt) - 1
    for position, alternatives in enumerate(others):
        assert alternatives[0].token_id == prompt[position + 1]
        for alternative in alternatives:
            assert alternative.logprob == pytest.approx(float(expected[position, alternative.token_id]), abs=1e-3)


@pytest.mark.parametrize(("kept", "expected"), [(10, 10), (-1, 250 - 6 + 2), (1000, 100)])
def test_a_prompt_can_be_cut_at_its_beginning(client, kept, expected):
    prompt = prompt_of(1, 100 if kept > 0 else 400)
    response = client.ask(prompt, max_tokens=10, truncate_prompt_tokens=kept, ignore_eos=True)
    assert response.num_input_tokens == expected
    assert list(response.outputs[0].token_ids) == client.ids(prompt[-expected:], max_tokens=10, ignore_eos=True)


def test_the_best_of_several_answers_are_those_of_most_probability(client):
    options = {"max_tokens": 15, "temperature": 1.0, "seed": 4, "ignore_eos": True, "logprobs": 0}
    everything = client.ask([5, 6, 7], n=6, **options).outputs
    best = client.ask([5, 6, 7], n=2, best_of=6, **options).outputs
    ranked = sorted(everything, key=lambda output: -output.cumulative_logprob)
    assert [output.token_ids for output in best] == [output.token_ids for output in ranked[:2]]
    assert [output.index for output in best] == [0, 1]
