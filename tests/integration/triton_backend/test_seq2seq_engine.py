"""Hugging Face's encoder–decoders through the engine: greedy tokens equal ``generate``, alone and in a crowd."""

from __future__ import annotations

import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    GenerationConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from exporters.fusions import fuse
from exporters.graph import save_graph
from exporters.seq2seq import measure, trace
from triton_backend.config import EngineConfig, LayerConfig, ModelConfig, VersionConfig
from triton_backend.errors import InvalidRequest
from triton_backend.loading import load_engine

from .conftest import Client

pytestmark = pytest.mark.integration

START_ID, FORCED_ID, EOS_ID = 2, 11, 1
SUPPRESSED = {"bart": (0, *range(20, 409, 3)), "t5": ()}
"""Tokens that are never chosen; a third of what a model might say, so that every beam meets them."""
MAX_MODEL_LEN, MAX_SOURCE_LEN = 64, 48
COMMON = {"vocab_size": 409, "eos_token_id": EOS_ID, "pad_token_id": 0, "decoder_start_token_id": START_ID}


def bart() -> PreTrainedModel:
    return BartForConditionalGeneration(
        BartConfig(
            **COMMON,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            max_position_embeddings=64,
            init_std=1.0,
            tie_word_embeddings=False,
        )
    )


def t5() -> PreTrainedModel:
    return T5ForConditionalGeneration(
        T5Config(
            **COMMON,
            d_model=32,
            d_kv=16,
            d_ff=64,
            num_layers=2,
            num_heads=2,
            relative_attention_num_buckets=8,
            relative_attention_max_distance=20,
            initializer_factor=4.0,
        )
    )


@pytest.fixture(scope="module", params=[bart, t5], ids=["bart", "t5"])
def model(request) -> PreTrainedModel:
    torch.manual_seed(2)
    model = request.param().eval()
    model.generation_config.suppress_tokens = list(SUPPRESSED[model.config.model_type])
    return model


@pytest.fixture(scope="module")
def version(model, checkpoint, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("seq2seq")
    shape, program = measure(model), trace(model, 64, MAX_SOURCE_LEN, MAX_MODEL_LEN)
    for name, part, length in (
        ("encoder.onnx", program.encoder, MAX_SOURCE_LEN),
        ("model.onnx", program.decoder, MAX_MODEL_LEN),
    ):
        fuse(part.model, length)
        save_graph(part, folder / name)
    facts = ModelConfig(
        architecture=type(model).__name__,
        model_type=model.config.model_type,
        vocab_size=shape.vocab_size,
        max_position_embeddings=MAX_MODEL_LEN,
        layers=tuple(LayerConfig(layer.num_kv_heads, layer.head_size) for layer in shape.layers),
        num_top_logits=64,
        eos_token_ids=(EOS_ID,),
        kind="encoder_decoder",
        encoder_graph="encoder.onnx",
        cross_layers=tuple(LayerConfig(layer.num_kv_heads, layer.head_size) for layer in shape.cross_layers),
        decoder_start_token_id=START_ID,
        forced_bos_token_id=FORCED_ID,
        forced_eos_token_id=EOS_ID,
        suppressed_token_ids=SUPPRESSED[model.config.model_type],
    )
    settings = EngineConfig(MAX_MODEL_LEN, max_num_seqs=8, max_source_len=MAX_SOURCE_LEN)
    VersionConfig(facts, settings).write(folder)
    shutil.copy(checkpoint / "tokenizer.json", folder)
    return folder


@pytest.fixture(scope="module")
def engine(version):
    engine, _ = load_engine(version, is_sealed=False)
    yield engine
    engine.stop()


@pytest.fixture
def client(engine, checkpoint):
    yield Client(engine, AutoTokenizer.from_pretrained(checkpoint))
    assert not engine._scheduler.has_work, "a test left requests behind"


def generate(model: PreTrainedModel, source: list[int], num_new: int, **options: Any) -> list[int]:
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=num_new,
        pad_token_id=0,
        eos_token_id=EOS_ID,
        decoder_start_token_id=START_ID,
        forced_bos_token_id=FORCED_ID,
        forced_eos_token_id=EOS_ID,
        suppress_tokens=list(SUPPRESSED[model.config.model_type]) or None,
        **options,
    )
    ids = torch.tensor([source])
    with torch.inference_mode():
        return model.generate(ids, attention_mask=torch.ones_like(ids))[0, 1:].tolist()


def source_of(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(3, 400), k=length)


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.6}, {"min_new_tokens": 20}])
def test_greedy_tokens_equal_generate(client, model, options):
    ours = {"min_tokens" if name == "min_new_tokens" else name: value for name, value in options.items()}
    seen = set()
    for length in (1, 2, 5, 31, MAX_SOURCE_LEN):
        expected = generate(model, source_of(length, length), 32, **options)
        assert client.ids(source_of(length, length), max_tokens=32, **ours) == expected
        seen |= set(expected)
    assert len(seen) > 6, "a model that always says the same proves nothing"


@pytest.mark.parametrize(
    "options", [{}, {"early_stopping": True}, {"length_penalty": 2.0}, {"no_repeat_ngram_size": 2}], ids=str
)
def test_beams_equal_generate_alone_and_in_a_crowd(client, model, options):
    lengths = (1, 4, 17, MAX_SOURCE_LEN)
    answers = [client.submit(source_of(n, n), max_tokens=24, beam_width=4, n=2, **options) for n in lengths]
    greedy = client.submit(source_of(3, 9), max_tokens=30)
    for length, answer in zip(lengths, answers, strict=True):
        source = torch.tensor([source_of(length, length)])
        generate(model, source_of(length, length), 24, num_beams=4, num_return_sequences=2, **options)
        with torch.inference_mode():
            found = model.generate(
                source, attention_mask=torch.ones_like(source), return_dict_in_generate=True, output_scores=True
            )
        outputs = answer.last().outputs
        assert [until_end(output.token_ids) for output in outputs] == [
            until_end(ids[1:]) for ids in found.sequences.tolist()
        ]
        assert [output.score for output in outputs] == pytest.approx(found.sequences_scores.tolist(), abs=1e-3)
    assert list(greedy.last().outputs[0].token_ids) == generate(model, source_of(3, 9), 30)


def until_end(ids) -> list[int]:
    ids = list(ids)
    return ids[: ids.index(EOS_ID)] if EOS_ID in ids else ids


def test_an_output_can_be_told_how_to_begin(client, model):
    prefix, source = [START_ID, 30, 40], source_of(5, 12)
    generate(model, source, 20)
    with torch.inference_mode():
        ids = torch.tensor([source])
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), decoder_input_ids=torch.tensor([prefix]))[
            0, len(prefix) :
        ].tolist()
    assert client.ids(source, max_tokens=20, decoder_input_ids=prefix[1:]) == expected


def test_log_probabilities_equal_the_original_model(client, model):
    source = source_of(9, 20)
    output = client.ask(source, max_tokens=20, logprobs=3, temperature=1.5, seed=1, ignore_eos=True).outputs[0]
    assert not set(output.token_ids) & set(SUPPRESSED[model.config.model_type])
    ids = torch.tensor([[START_ID, *output.token_ids[:-1]]])
    with torch.inference_mode():
        expected = torch.log_softmax(model(torch.tensor([source]), decoder_input_ids=ids).logits[0], dim=-1)
    for token_id, alternatives, row in list(zip(output.token_ids, output.logprobs, expected, strict=True))[1:]:
        assert alternatives[0].token_id == token_id
        for alternative in alternatives:
            # With weights as wide as these, float32 itself is 2e-3 away from float64.
            assert math.isclose(alternative.logprob, row[alternative.token_id], abs_tol=1e-2)


def test_the_tokens_of_a_source_are_told(client):
    response = client.ask(source_of(9, 20), max_tokens=1, return_prompt_tokens=True, decoder_input_ids=[30, 40])
    assert [token.token_id for token in response.prompt_tokens] == source_of(9, 20)
    assert response.prompt_logprobs is None


def test_a_source_has_no_log_probabilities_but_a_begun_output_has(client):
    with pytest.raises(InvalidRequest, match="prompt_logprobs has value 0, but the source text"):
        client.ask(source_of(9, 20), max_tokens=1, prompt_logprobs=0)
    response = client.ask(source_of(9, 20), max_tokens=1, prompt_logprobs=0, decoder_input_ids=[30, 40])
    assert [token.token_id for token in response.prompt_tokens] == [START_ID, 30, 40]
    assert [token and token[0].token_id for token in response.prompt_logprobs] == [None, 30, 40]


def test_a_beginning_that_the_graph_cannot_take_is_refused_and_nobody_else_fails(client):
    other = client.submit([5, 6, 7], max_tokens=20, ignore_eos=True)
    with pytest.raises(InvalidRequest, match=f"takes at most {MAX_SOURCE_LEN - 2}"):
        client.ask([5, 6, 7], decoder_input_ids=[5] * (MAX_SOURCE_LEN - 1), max_tokens=2)
    assert client.ask([5, 6, 7], decoder_input_ids=[5] * (MAX_SOURCE_LEN - 2), max_tokens=2).error is None
    assert other.last().error is None


@pytest.mark.parametrize("options", [{}, {"beam_width": 2}], ids=["greedy", "beams"])
def test_tokens_that_the_model_forces_are_no_part_of_a_grammar(client, options):
    regex = {"structured_outputs": {"regex": "[a-z]{60}"}, "max_tokens": 5, **options}
    response = client.ask([5, 6, 7], **regex)
    assert response.error is None
    assert (response.outputs[0].token_ids[-1], response.outputs[0].finish_reason) == (EOS_ID, "length")


@pytest.mark.parametrize("options", [{}, {"beam_width": 2, "n": 2}], ids=["greedy", "beams"])
def test_a_request_that_is_preempted_keeps_its_source_and_goes_on_with_the_same_bits(client, options):
    patient = {"max_tokens": 50, "ignore_eos": True, "priority": 5, **options}
    expected = [client.ask(source_of(i, 20 + i), **patient).outputs for i in range(4)]
    answers = [client.submit(source_of(i, 20 + i), **patient) for i in range(4)]
    for _ in range(5):
        assert client.ask(source_of(9, 5), n=8, max_tokens=3, temperature=1.0, priority=0).error is None
    responses = [answer.last() for answer in answers]
    assert [response.outputs for response in responses] == expected
    assert sum(response.metrics["preemptions"] for response in responses) > 0


def test_sixteen_at_once_get_the_bits_that_each_gets_alone(client, model):
    sources = [source_of(i, 1 + i * 3) for i in range(16)]
    options = [
        {"max_tokens": 10 + i, **({"temperature": 1.0, "seed": i, "n": 2, "logprobs": 1} if i % 2 else {})}
        for i in range(16)
    ]
    answers = [client.submit(source, **options[i]) for i, source in enumerate(sources)]
    together = [answer.last().outputs for answer in answers]
    for i, source in enumerate(sources):
        assert client.ask(source, **options[i]).outputs == together[i], f"request {i}"
        if i % 2 == 0:
            assert list(together[i][0].token_ids) == generate(model, source, 10 + i)
