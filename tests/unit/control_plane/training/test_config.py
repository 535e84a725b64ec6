"""A setting that cannot work is refused by name before anything is done."""

from __future__ import annotations

import pytest

from control_plane.training.config import PretrainConfig
from control_plane.training.errors import InvalidOption

pytestmark = pytest.mark.unit


def test_defaults_are_sound() -> None:
    PretrainConfig().check()


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
