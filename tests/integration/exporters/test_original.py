"""What only a loaded checkpoint shows: weights that do not fit the config, or are not numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from exporters.checkpoint import open_checkpoint
from exporters.errors import ExportError, InvalidCheckpoint, UnsupportedArchitecture, reason_of
from exporters.original import load_config, load_model

pytestmark = pytest.mark.integration

QUERY = "model.layers.1.self_attn.q_proj.weight"


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def refused(folder: Path, kind: type[ExportError], *words: str) -> None:
    with pytest.raises(kind) as caught:
        load_model(open_checkpoint(str(folder)))
    for word in words:
        assert word in str(caught.value)


@pytest.fixture
def folder(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint("llama", hidden_size=32, intermediate_size=32)


def test_half_precision_weights_are_loaded_as_float32(folder: Path) -> None:
    change_weights(folder, lambda weights: weights.update({k: v.bfloat16() for k, v in weights.items()}))
    assert {parameter.dtype for parameter in load_model(open_checkpoint(str(folder))).parameters()} == {torch.float32}


def test_a_tied_head_needs_no_weight_of_its_own(make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint("llama_tied_biased")
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    load_model(open_checkpoint(str(folder)))


def test_missing_weights_are_named(folder: Path) -> None:
    change_weights(folder, lambda weights: weights.pop(QUERY))
    refused(folder, InvalidCheckpoint, "lacks 1 weights", QUERY)


def test_a_config_of_fewer_layers_than_the_weights_is_refused(folder: Path) -> None:
    change_config(folder, num_hidden_layers=1)
    refused(folder, InvalidCheckpoint, "model.layers.1.", "config.json has 1 layers")


def test_a_weight_of_another_shape_is_named(folder: Path) -> None:
    change_weights(folder, lambda weights: weights.update({QUERY: torch.zeros(8, 32)}))
    refused(folder, InvalidCheckpoint, QUERY, "[8, 32]", "[32, 32]")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(folder: Path, value: float) -> None:
    change_weights(folder, lambda weights: weights[QUERY].__setitem__((3, 4), value))
    refused(folder, InvalidCheckpoint, QUERY, "NaN or infinite")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": "32"}, "hidden_size"),
        ({"hidden_act": "nope"}, "KeyError: 'nope'"),
        ({"num_key_value_heads": 0}, "ZeroDivisionError"),
        ({"pad_token_id": 999}, "AssertionError"),
    ],
)
def test_a_value_that_no_model_can_have_is_the_checkpoint_s_fault(
    folder: Path, changes: dict[str, Any], said: str
) -> None:
    change_config(folder, **changes)
    refused(folder, InvalidCheckpoint, "transformers cannot", said)


def test_an_error_without_words_has_its_kind() -> None:
    assert reason_of(KeyError()) == "KeyError"
    assert reason_of(ValueError("\nfirst\nsecond")) == "ValueError: first"


def test_an_encoder_decoder_is_refused(folder: Path) -> None:
    change_config(folder, model_type="t5")
    with pytest.raises(UnsupportedArchitecture, match="'t5' is an encoder-decoder model"):
        load_config(open_checkpoint(str(folder)))


def test_a_model_that_is_no_language_model_is_refused(folder: Path) -> None:
    change_config(folder, model_type="vit")
    with pytest.raises(UnsupportedArchitecture, match="'vit' has no causal language model"):
        load_config(open_checkpoint(str(folder)))


def test_an_unknown_architecture_is_refused(folder: Path) -> None:
    change_config(folder, model_type="hal9000")
    with pytest.raises(UnsupportedArchitecture, match="hal9000"):
        load_config(open_checkpoint(str(folder)))
