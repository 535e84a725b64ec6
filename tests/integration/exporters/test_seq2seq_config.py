"""Encoder–decoder checkpoints: which kind a config describes, what is refused, and what model.json says of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, PreTrainedTokenizerFast

from exporters.checkpoint import Checkpoint, open_checkpoint
from exporters.config import ExportConfig
from exporters.errors import ExportError, InvalidCheckpoint, InvalidConfig, UnsupportedArchitecture
from exporters.generation_config import suppressed_tokens
from exporters.original import kind_of, load_seq2seq_config, load_seq2seq_model
from exporters.seq2seq import measure, trace
from exporters.seq2seq_config import GenerationStart, generation_start, seq2seq_version_config
from tests.integration.exporters.test_seq2seq import FAMILIES, make_model
from triton_backend.config import LayerConfig, VersionConfig

pytestmark = pytest.mark.integration

CROSS_KEY = "model.decoder.layers.0.encoder_attn.k_proj.weight"


@pytest.fixture
def save(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Callable[..., Checkpoint]:
    """Writes a checkpoint of a family; ``generation`` is added to its generation_config.json."""

    def make(name: str, **generation: Any) -> Checkpoint:
        make_model(*FAMILIES[name]).save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        path = tmp_path / "generation_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **generation}))
        return open_checkpoint(str(tmp_path))

    return make


def version_config_of(checkpoint: Checkpoint, **asked: Any) -> VersionConfig:
    model = load_seq2seq_model(checkpoint)
    export = ExportConfig(str(checkpoint.folder), checkpoint.folder / "out", **asked)
    return seq2seq_version_config(export, checkpoint, model, measure(model), 64)


@pytest.mark.parametrize(
    ("model_type", "changes", "kind"),
    [
        ("llama", {}, "decoder"),
        ("gpt_neox", {"architectures": ["GPTNeoXModel"]}, "decoder"),
        ("gpt2", {"architectures": ["GPT2LMHeadModel"]}, "decoder"),
        ("bert", {"architectures": ["BertForMaskedLM"]}, "encoder"),
        ("bert", {"architectures": ["BertLMHeadModel"], "is_decoder": True}, "decoder"),
        ("bert", {}, "encoder"),
        ("xlm-roberta", {"architectures": ["XLMRobertaModel"]}, "encoder"),
        ("mpnet", {}, "encoder"),
        ("distilbert", {}, "encoder"),
        ("modernbert", {}, "encoder"),
        ("t5", {}, "encoder_decoder"),
        ("marian", {}, "encoder_decoder"),
    ],
)
def test_kind_of_a_config(model_type: str, changes: dict[str, Any], kind: str) -> None:
    assert kind_of(AutoConfig.for_model(model_type, **changes)) == kind


@pytest.mark.parametrize("name", ["bart", "t5", "marian", "m2m_100", "flan_t5"])
def test_a_saved_model_loads_with_the_same_weights(save: Callable[..., Checkpoint], name: str) -> None:
    loaded = load_seq2seq_model(save(name)).state_dict()
    for weight, expected in make_model(*FAMILIES[name]).state_dict().items():
        assert torch.equal(loaded[weight], expected), weight


def test_missing_cross_attention_is_named(save: Callable[..., Checkpoint]) -> None:
    checkpoint = save("bart")
    weights = load_file(checkpoint.folder / "model.safetensors")
    del weights[CROSS_KEY]
    save_file(weights, checkpoint.folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InvalidCheckpoint, match="lacks 1 weights") as refusal:
        load_seq2seq_model(checkpoint)
    assert CROSS_KEY in str(refusal.value)


def test_a_config_of_fewer_decoder_layers_than_the_weights_is_refused(save: Callable[..., Checkpoint]) -> None:
    checkpoint = save("bart")
    path = checkpoint.folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "encoder_layers": 1, "decoder_layers": 1}))
    with pytest.raises(InvalidCheckpoint, match="has 1 layers"):
        load_seq2seq_model(checkpoint)


def test_a_decoder_is_no_encoder_decoder(llama_checkpoint: Path) -> None:
    with pytest.raises(UnsupportedArchitecture, match="'llama' has no encoder-decoder language model"):
        load_seq2seq_config(open_checkpoint(str(llama_checkpoint)))


def test_generation_begins_as_the_checkpoint_s_generation_config_says(save: Callable[..., Checkpoint]) -> None:
    checkpoint = save("marian", forced_bos_token_id=7, forced_eos_token_id=2, bad_words_ids=[[319], [5, 6]])
    model = load_seq2seq_model(checkpoint)
    assert generation_start(model) == GenerationStart(319, 7, 2)
    assert suppressed_tokens(model) == [319]


def test_a_checkpoint_that_does_not_say_how_to_begin_is_refused(save: Callable[..., Checkpoint]) -> None:
    model = load_seq2seq_model(save("pegasus"))
    model.generation_config.decoder_start_token_id = None
    with pytest.raises(InvalidCheckpoint, match="no decoder_start_token_id"):
        generation_start(model)


def test_model_json_holds_both_graphs_and_their_limits(save: Callable[..., Checkpoint]) -> None:
    found = version_config_of(save("bart", forced_bos_token_id=0), max_num_seqs=4)
    assert (found.model.kind, found.model.encoder_graph) == ("encoder_decoder", "encoder.onnx")
    assert found.model.layers == found.model.cross_layers == (LayerConfig(4, 16),) * 2
    assert (found.model.decoder_start_token_id, found.model.forced_bos_token_id) == (2, 0)
    assert (found.engine.max_model_len, found.engine.max_source_len) == (64, 64)
    assert found.engine.max_num_batched_tokens == 64, "no chunk may be longer than a source may be"


def test_relative_positions_have_no_limit_of_their_own(save: Callable[..., Checkpoint]) -> None:
    found = version_config_of(save("t5"), max_model_len=200)
    assert (found.engine.max_model_len, found.engine.max_source_len) == (200, 1024)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"max_source_len": 65}, "takes 64 tokens"),
        ({"max_model_len": 65}, "max_model_len has value 65"),
        ({"max_source_len": 20, "max_num_seqs": 32}, "max_num_seqs + 2 = 34"),
        ({"engine": {"max_num_batched_tokens": 65}}, "max_source_len = 64 at once"),
    ],
)
def test_lengths_that_do_not_suit_the_model_are_refused(
    save: Callable[..., Checkpoint], asked: dict[str, Any], words: str
) -> None:
    with pytest.raises(InvalidConfig) as refusal:
        version_config_of(save("bart"), **asked)
    assert words in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "lengths", "words"),
    [("bart", (65, 64), "embed 65 positions"), ("t5gemma", (65, 64), "see 64 tokens around each")],
)
def test_tables_longer_than_the_model_are_refused(name: str, lengths: tuple[int, int], words: str) -> None:
    with pytest.raises(ExportError) as refusal:
        trace(make_model(*FAMILIES[name]), 64, *lengths)
    assert words in str(refusal.value)
