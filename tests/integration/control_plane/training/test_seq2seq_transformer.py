"""The encoder–decoder: padding and the future change nothing, and a folder holds it without pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from control_plane.training.recipes.seq2seq_transformer import Seq2SeqTransformer, Seq2SeqTransformerConfig

pytestmark = pytest.mark.integration

FORMS: dict[str, dict[str, Any]] = {
    "default": {},
    "original paper": {"norm_first": False, "activation": "relu"},
    "learned, nothing shared": {"positions": "learned", "share_embeddings": False, "tie_word_embeddings": False},
    "uneven": {"num_encoder_layers": 1, "num_decoder_layers": 3, "activation": "gelu", "share_embeddings": False},
}


def make_model(seed: int = 0, **form: Any) -> Seq2SeqTransformer:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 40}
    return Seq2SeqTransformer(Seq2SeqTransformerConfig(**{**sizes, **form})).eval()


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(1, 60, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("form", FORMS)
def test_what_is_padded_beside_a_row_changes_nothing(form: str) -> None:
    model = make_model(**FORMS[form])
    source, target = tokens(2, 9), tokens(2, 7)
    mask, target_mask = torch.ones_like(source), torch.ones_like(target)
    mask[1, 4:], target_mask[1, 3:] = 0, 0
    with torch.no_grad():
        batch = model(source, mask, target, target_mask)
        alone = model(source[1:, :4], mask[1:, :4], target[1:, :3])
    torch.testing.assert_close(batch[1, :3], alone[0], atol=1e-5, rtol=1e-5)
    assert torch.isfinite(batch).all()


def test_a_token_does_not_see_the_ones_after_it() -> None:
    model = make_model()
    source, target = tokens(1, 5), tokens(1, 7)
    changed = target.clone()
    changed[0, 4] = (target[0, 4] + 1) % 60
    with torch.no_grad():
        logits, others = (model(source, torch.ones_like(source), ids) for ids in (target, changed))
    torch.testing.assert_close(logits[0, :4], others[0, :4], atol=1e-6, rtol=1e-6)
    assert (logits[0, 4:] - others[0, 4:]).abs().max() > 1e-3


@pytest.mark.parametrize("form", FORMS)
def test_a_folder_gives_back_the_same_model(form: str, tmp_path: Path) -> None:
    model = make_model(**FORMS[form])
    model.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llmos-seq2seq"

    loaded = Seq2SeqTransformer.load(tmp_path)

    assert loaded.config == model.config and loaded.num_parameters == model.num_parameters
    source = tokens(1, 5)
    with torch.no_grad():
        expected, found = (m(source, torch.ones_like(source), source) for m in (model, loaded))
    assert torch.equal(expected, found)
    is_tied = loaded.head.weight is loaded.target_embeddings.weight
    assert is_tied == FORMS[form].get("tie_word_embeddings", True)


def test_generate_ends_each_row_at_its_end_and_takes_a_prefix() -> None:
    model = make_model(seed=3, tie_word_embeddings=False)
    source = tokens(3, 6)
    mask = torch.ones_like(source)
    endless = model.generate(source, mask, 8, ignore_eos=True)
    assert [len(row) for row in endless] == [8, 8, 8]
    with torch.no_grad():
        prefix = torch.tensor([[0, *endless[0][:3]]])
        likeliest = int(model(source[:1], mask[:1], prefix)[0, -1].argmax())
    assert likeliest == endless[0][3]
    assert model.generate(source[:1], mask[:1], 5, prefix, ignore_eos=True)[0] == endless[0][3:]
    model.config = Seq2SeqTransformerConfig(**{**vars(model.config), "eos_token_id": endless[0][4]})
    assert model.generate(source[:1], mask[:1], 8)[0] == endless[0][: endless[0].index(endless[0][4])]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"hidden_size": 30}, "hidden_size has value 30; expected a multiple of 8, twice the heads"),
        ({"activation": "tanh"}, "activation has value 'tanh'; expected one of relu, gelu"),
        ({"positions": "rotary"}, "positions has value 'rotary'; expected one of sinusoidal, learned"),
        ({"eos_token_id": 60}, "eos_token_id has value 60; expected a token id below 60"),
        ({"num_encoder_layers": 0}, "num_encoder_layers has value 0; expected a whole number ≥ 1"),
        ({"dropout": 1.0}, "dropout has value 1.0; expected a number from 0 to below 1"),
    ],
)
def test_a_form_that_cannot_work_is_named(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make_model(**settings)


def test_files_that_do_not_belong_together_are_named(tmp_path: Path) -> None:
    make_model().save(tmp_path)
    document = json.loads((tmp_path / "config.json").read_text())
    for changes, said in (
        ({"vocab_size": 61}, r"weight source_embeddings\.weight has shape \[60, 32\] .* expects \[61, 32\]"),
        ({"num_decoder_layers": 1}, r"weight decoder\.layers\.1\.\S+ has shape \[\d+.*expects None"),
        ({"tie_word_embeddings": False}, r"weight head\.weight has shape None .* expects \[60, 32\]"),
        ({"rotary": True}, r"config\.json: unknown key 'rotary'"),
        ({"model_type": "bart"}, "model_type 'bart'; expected 'llmos-seq2seq'"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**document, **changes}))
        with pytest.raises(ValueError, match=said):
            Seq2SeqTransformer.load(tmp_path)
