"""What a checkpoint asks of ``generate``: what is never chosen, what becomes a default, and what nobody does."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from exporters.checkpoint import Checkpoint
from exporters.errors import InvalidCheckpoint
from exporters.generation_config import (
    generation_defaults,
    ignored_settings,
    load_generation_config,
    suppressed_tokens,
)

pytestmark = pytest.mark.unit

EOS_ID, VOCAB_SIZE = 1, 10


def suppressed(**settings: Any) -> list[int]:
    given = {"bad_words_ids": None, "suppress_tokens": None, "eos_token_id": EOS_ID, **settings}
    head = SimpleNamespace(weight=SimpleNamespace(shape=(VOCAB_SIZE, 4)))
    model: Any = SimpleNamespace(generation_config=SimpleNamespace(**given), get_output_embeddings=lambda: head)
    return suppressed_tokens(model)


def checkpoint(folder: Path, file: str, **settings: Any) -> Checkpoint:
    (folder / file).write_text(json.dumps({"model_type": "bart", **settings}))
    return Checkpoint(folder, str(folder), {"model_type": "bart"}, {}, ())


def test_an_end_can_be_suppressed_but_is_no_bad_word() -> None:
    assert suppressed(bad_words_ids=[[5], [EOS_ID], [2, 3]]) == [5]
    assert suppressed(bad_words_ids=[[5], [6], [7]], eos_token_id=[5, 6]) == [7]
    assert suppressed(suppress_tokens=[EOS_ID]) == [EOS_ID]


def test_tokens_outside_the_vocabulary_are_left_out() -> None:
    assert suppressed(suppress_tokens=[-1, 0, 9, 10, 99]) == [0, 9]


@pytest.mark.parametrize("words", [[5], "five", [["five"]], [[]], [[True]]], ids=str)
def test_bad_words_that_are_none_are_named(words: Any) -> None:
    with pytest.raises(InvalidCheckpoint, match=r"have bad_words_ids .*; expected"):
        suppressed(bad_words_ids=words)


def test_defaults_are_numbers_of_the_engine_s_kinds(tmp_path: Path) -> None:
    found = checkpoint(tmp_path, "generation_config.json", num_beams="4", top_k=50.0)
    assert generation_defaults(load_generation_config(found), found) == {"top_k": 50, "beam_width": 4}


def test_a_number_may_stand_for_true(tmp_path: Path) -> None:
    found = checkpoint(tmp_path, "generation_config.json", num_beams=4, early_stopping=1)
    assert generation_defaults(load_generation_config(found), found) == {"beam_width": 4, "early_stopping": True}


@pytest.mark.parametrize(
    ("name", "value", "expected"), [("temperature", "hot", "a number"), ("num_beams", 1.5, "a whole number")]
)
def test_a_default_that_the_engine_would_refuse_is_named(name: str, value: Any, expected: str, tmp_path: Path) -> None:
    found = checkpoint(tmp_path, "generation_config.json", **{name: value})
    with pytest.raises(InvalidCheckpoint, match=rf"generation_config\.json: {name} has value .*; expected {expected}"):
        generation_defaults(load_generation_config(found), found)


def test_settings_of_an_old_checkpoint_are_in_its_config(tmp_path: Path) -> None:
    found = checkpoint(tmp_path, "config.json", num_beams=4, no_repeat_ngram_size=3)
    assert generation_defaults(load_generation_config(found), found) == {"beam_width": 4, "no_repeat_ngram_size": 3}


def test_what_the_engine_does_not_do_is_listed(tmp_path: Path) -> None:
    given = {"min_length": 10, "encoder_no_repeat_ngram_size": 0, "bad_words_ids": [[5], [2, 3]]}
    settings = load_generation_config(checkpoint(tmp_path, "generation_config.json", **given))
    assert ignored_settings(settings) == {"min_length": 10, "bad_words_ids": [[2, 3]]}


def test_a_setting_that_is_an_object_is_told_as_json(tmp_path: Path) -> None:
    found = checkpoint(tmp_path, "generation_config.json", watermarking_config={"bias": 2.0})
    told = ignored_settings(load_generation_config(found))
    assert json.loads(json.dumps(told))["watermarking_config"]["bias"] == 2.0


def test_settings_that_transformers_cannot_read_are_named(tmp_path: Path) -> None:
    found = checkpoint(tmp_path, "generation_config.json", max_new_tokens="many")
    with pytest.raises(InvalidCheckpoint, match=r"generation_config\.json \(TypeError: .*\); correct them"):
        load_generation_config(found)
