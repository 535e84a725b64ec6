"""A setting that cannot work is refused by name before anything is done."""

from __future__ import annotations

import pytest

from control_plane.training.config import PretrainConfig, Seq2SeqConfig
from control_plane.training.errors import InvalidOption

pytestmark = pytest.mark.unit


def test_defaults_are_sound() -> None:
    PretrainConfig().check()
    Seq2SeqConfig().check()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"max_steps": 0}, "max_steps has value 0; expected a number above 0"),
        ({"learning_rate": float("nan")}, "learning_rate has value nan; expected a number above 0"),
        ({"vocab_size": 100}, "vocab_size has value 100; expected at least 257"),
        ({"max_seq_length": 2048}, "max_seq_length has value 2048; expected at most max_position_embeddings, 1024"),
        ({"hidden_size": 36}, "hidden_size has value 36; expected a multiple of twice the num_attention_heads, 8"),
        ({"num_key_value_heads": 3}, "num_attention_heads has value 4; expected a multiple of num_key_value_heads, 3"),
    ],
)
def test_setting_that_cannot_work_is_named(settings: dict[str, float], said: str) -> None:
    with pytest.raises(InvalidOption, match=said):
        PretrainConfig(**settings).check()  # type: ignore[arg-type]


def test_seed_and_warm_up_may_be_zero() -> None:
    PretrainConfig(seed=0, warmup_steps=0, weight_decay=0.0).check()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"max_steps": 0}, "max_steps has value 0; expected a number above 0"),
        ({"vocab_size": 100}, "vocab_size has value 100; expected at least 257"),
        ({"label_smoothing_factor": 1.0}, "label_smoothing_factor has value 1.0; expected a fraction below 1"),
        ({"max_target_len": 256}, "max_target_len has value 256; expected at least 2 and less than max_position_emb"),
        ({"hidden_size": 144}, "hidden_size has value 144; expected a multiple of 8 times the num_attention_heads, 32"),
    ],
)
def test_setting_of_an_encoder_decoder_that_cannot_work_is_named(settings: dict[str, float], said: str) -> None:
    with pytest.raises(InvalidOption, match=said):
        Seq2SeqConfig(**settings).check()  # type: ignore[arg-type]


def test_dropout_and_label_smoothing_may_be_zero() -> None:
    Seq2SeqConfig(dropout=0.0, label_smoothing_factor=0.0).check()
