"""Encoder–decoders: the source decides, whoever else is in the batch; every way such a request is refused or ends."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time

import pytest
from transformers import AutoTokenizer

from triton_backend.errors import InvalidRequest
from triton_backend.loading import load_engine
from triton_backend.protocol import GenerateRequest
from triton_backend.sampling_params import SamplingParams

from .conftest import Answer, Client
from .tiny_graphs import MAX_MODEL_LEN, MAX_SOURCE_LEN, START_ID, TinyModel, edited, write_version

pytestmark = pytest.mark.integration

FORCED_ID = 7
LONG = {"max_tokens": MAX_MODEL_LEN, "ignore_eos": True}


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return AutoTokenizer.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def model(tokenizer) -> TinyModel:
    return TinyModel(len(tokenizer), has_cross=True)


@pytest.fixture(scope="module")
def version(model, checkpoint, tmp_path_factory):
    # A budget of 12 tokens: most sources are longer, and must go on alone.
    folder = tmp_path_factory.mktemp("seq2seq") / "1"
    return write_version(folder, model, checkpoint, max_num_batched_tokens=12)


@pytest.fixture(scope="module")
def engine(version):
    engine, _ = load_engine(version, is_sealed=False)
    yield engine
    engine.stop()


@pytest.fixture
def client(engine, tokenizer):
    yield Client(engine, tokenizer)
    assert not engine._scheduler.has_work, "a test left requests behind"


def source_of(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(1, 400), k=length)


@pytest.mark.parametrize("length", [1, 2, 3, 17, MAX_SOURCE_LEN])
def test_greedy_tokens_follow_from_the_source_alone(client, model, length):
    source = source_of(length, length)
    expected = model.greedy([START_ID], 40, source)
    assert client.ids(source, max_tokens=40, ignore_eos=True) == expected
    assert len(set(expected)) > 5, "a model that repeats itself proves nothing"


def test_text_is_the_source_and_the_answer_does_not_repeat_it(client, model, tokenizer):
    text = "The import statement"
    source = tokenizer(text)["input_ids"]
    expected = model.greedy([START_ID], 20, source)
    response = client.ask(text, max_tokens=20, ignore_eos=True)
    assert response.outputs[0].text == tokenizer.decode(expected, skip_special_tokens=True)
    assert response.num_input_tokens == len(source)


PARAMS = [
    {"ignore_eos": True},
    {"temperature": 1.0, "seed": 5},
    {"temperature": 0.8, "seed": 6, "top_k": 10, "logprobs": 2},
    {"repetition_penalty": 1.5},
]


def test_every_request_of_a_crowd_gets_the_bits_it_gets_alone(client):
    def options(i):
        return {"max_tokens": 5 + i, **PARAMS[i % len(PARAMS)]}

    sources = [source_of(i, 1 + (i * 13) % MAX_SOURCE_LEN) for i in range(24)]
    answers = [client.submit(source, **options(i)) for i, source in enumerate(sources)]
    together = [answer.last().outputs for answer in answers]
    for i, source in enumerate(sources):
        assert client.ask(source, **options(i)).outputs == together[i], f"request {i}"


def test_n_sequences_share_one_source_and_are_the_same_alone_and_in_a_crowd(client, model):
    source = source_of(1, 20)
    options = {"max_tokens": 20, "n": 3, "temperature": 2.0, "seed": 3, "ignore_eos": True}
    alone = client.ask(source, **options).outputs
    assert len({output.token_ids for output in alone}) == 3
    crowd = [client.submit(source_of(i, 10 + i), max_tokens=10 + i, ignore_eos=True) for i in range(12)]
    assert client.ask(source, **options).outputs == alone
    for answer in crowd:
        answer.last()
    greedy = client.ask(source, max_tokens=20, n=2, ignore_eos=True).outputs
    assert all(list(output.token_ids) == model.greedy([START_ID], 20, source) for output in greedy)


def test_a_sequence_that_is_moved_to_another_row_keeps_its_source(client, model):
    short = client.submit(source_of(1, 5), max_tokens=3, ignore_eos=True)
    sources = [source_of(i, 8 + i) for i in range(3)]
    moved = [client.submit(source, max_tokens=50, ignore_eos=True) for source in sources]
    short.last()
    for source, answer in zip(sources, moved, strict=True):
        assert list(answer.last().outputs[0].token_ids) == model.greedy([START_ID], 50, source)


def test_the_output_may_be_as_long_as_the_decoders_rows(client):
    output = client.ask(source_of(2, MAX_SOURCE_LEN), max_tokens=10**6, ignore_eos=True).outputs[0]
    assert len(output.token_ids) == MAX_MODEL_LEN - 1  # the decoder's own first token takes a place, too
    assert output.finish_reason == "length"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ([5] * (MAX_SOURCE_LEN + 1), "the source text has 49 tokens, but the model reads at most 48 tokens"),
        ("", "the prompt is empty"),
        ([], "the prompt is empty"),
        ([10**6], "input_ids has value 1000000; expected token ids from 0 to "),
    ],
)
def test_a_source_that_cannot_be_read_is_refused_at_once(client, source, said):
    with pytest.raises(InvalidRequest) as caught:
        client.ask(source)
    assert said in str(caught.value)


def test_a_request_cancelled_while_its_source_is_encoded_frees_its_row_and_disturbs_nobody(client, model, monkeypatch):
    beside = client.submit(source_of(1, 9), max_tokens=40, ignore_eos=True)
    leaving = Answer()
    encode = client.engine._runner.encode

    def encode_while_the_client_leaves(row, source_ids):
        leaving.gone = len(source_ids) == 30
        encode(row, source_ids)
        time.sleep(0.03)  # as long as a large encoder takes: the next poll is due

    monkeypatch.setattr(client.engine._runner, "encode", encode_while_the_client_leaves)
    request = GenerateRequest("r", SamplingParams(temperature=0.0, **LONG), input_ids=tuple(source_of(2, 30)))
    client.engine.submit(request, leaving)
    assert leaving.last().error == "CANCELLED: the client cancelled the request"
    assert list(beside.last().outputs[0].token_ids) == model.greedy([START_ID], 40, source_of(1, 9))


def test_a_health_probe_has_a_source_row_of_its_own(client, model):
    crowd = [client.submit(source_of(i, 9), **LONG) for i in range(16)]
    probe = Answer()
    source = source_of(77, 16)
    params = SamplingParams(max_tokens=1, temperature=0.0)
    client.engine.submit(GenerateRequest("p", params, input_ids=tuple(source), health_probe=True), probe)
    response = probe.last()
    assert client.engine._scheduler.has_work, "the crowd was still running"
    assert list(response.outputs[0].token_ids) == model.greedy([START_ID], 1, source)
    outputs = [answer.last().outputs[0] for answer in crowd]
    for i in (0, 7, 15):
        assert list(outputs[i].token_ids) == model.greedy([START_ID], MAX_MODEL_LEN - 1, source_of(i, 9))


def test_a_forced_first_token_is_part_of_the_output_and_certain(model, version, tokenizer, tmp_path):
    folder = edited(version, tmp_path / "1", forced_bos_token_id=FORCED_ID)
    engine, _ = load_engine(folder, is_sealed=False)
    try:
        client, source = Client(engine, tokenizer), source_of(4, 12)
        expected = [FORCED_ID, *model.greedy([START_ID, FORCED_ID], 9, source)]
        output = client.ask(source, max_tokens=10, logprobs=2, ignore_eos=True).outputs[0]
        assert list(output.token_ids) == expected
        assert [(t.token_id, t.logprob, t.rank) for t in output.logprobs[0]] == [(FORCED_ID, 0.0, 1)]
        sampled = client.ask(source, max_tokens=10, n=4, temperature=2.0, seed=1, min_tokens=5).outputs
        assert {output.token_ids[0] for output in sampled} == {FORCED_ID}
        assert client.ids(source, max_tokens=1) == [FORCED_ID]
    finally:
        engine.stop()


def test_an_end_that_is_forced_for_lack_of_room_is_no_end_of_the_text(model, version, tokenizer, tmp_path):
    folder = edited(version, tmp_path / "1", forced_bos_token_id=FORCED_ID, forced_eos_token_id=0)
    engine, _ = load_engine(folder, is_sealed=False)
    try:
        client, source = Client(engine, tokenizer), source_of(4, 12)
        tokens = [FORCED_ID, *model.greedy([START_ID, FORCED_ID], 9, source)]
        output = client.ask(source, max_tokens=10).outputs[0]
        assert (list(output.token_ids), output.finish_reason) == ([*tokens[:9], 0], "length")
        assert output.text == tokenizer.decode(tokens[:9], skip_special_tokens=True)
        assert client.ids(source, max_tokens=10, ignore_eos=True) == tokens
    finally:
        engine.stop()


def test_json_lines_carry_sources_as_they_carry_prompts(version, model):
    sources = [source_of(seed, 6 + seed) for seed in range(3)]
    options = {"max_tokens": 12, "temperature": 0, "ignore_eos": True}
    lines = [
        json.dumps({"id": str(i), "input_ids": source, "sampling_parameters": options})
        for i, source in enumerate([*sources, [1] * 99])
    ]
    command = [sys.executable, "-m", "triton_backend", str(version), "--unsealed"]
    done = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True, timeout=60, check=True)
    answers = {answer["id"]: answer for answer in map(json.loads, done.stdout.splitlines())}
    for i, source in enumerate(sources):
        answer = answers[str(i)]
        assert answer["outputs"][0]["token_ids"] == model.greedy([START_ID], 12, source)
        assert answer["num_input_tokens"] == len(source)
    assert answers["3"]["error"].startswith("INVALID_ARG: the source text has 99 tokens")
