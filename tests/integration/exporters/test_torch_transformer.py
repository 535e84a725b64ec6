"""Our own encoder–decoder, exported like any other: tokens equal to its own slow decoding."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM, GenerationConfig

from control_plane.training.recipes.seq2seq_transformer import Seq2SeqTransformer, Seq2SeqTransformerConfig
from exporters.errors import UnsupportedArchitecture
from exporters.seq2seq import measure
from exporters.torch_transformer import TorchTransformerForSeq2SeqLM, register
from tests.integration.exporters.conftest import VOCAB_SIZE
from tests.integration.exporters.seq2seq_loop import Seq2SeqLoop, export_graphs

pytestmark = pytest.mark.integration

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_encoder_layers": 1,
    "num_decoder_layers": 2,
    "max_position_embeddings": 128,
}
FORMS: dict[str, dict[str, Any]] = {
    "norm first": {},
    "original paper": {
        "norm_first": False,
        "activation": "gelu",
        "positions": "learned",
        "share_embeddings": False,
        "tie_word_embeddings": False,
        "num_decoder_layers": 1,
    },
}
SOURCE_LENGTHS = (17, 1, 33, 5, 9, 2, 28, 12)
PREFIX_LENGTHS = (5, 1, 8, 3, 1, 2, 6, 4)
NUM_NEW_TOKENS = 32


def make_original(**form: Any) -> Seq2SeqTransformer:
    torch.manual_seed(0)
    model = Seq2SeqTransformer(Seq2SeqTransformerConfig(**{**SIZES, **form})).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            # Positions that weigh as much as tokens, so that greedy tokens vary.
            torch.nn.init.normal_(parameter, std=3.0 if "positions" in name else 0.6)
    return model


def load(original: Seq2SeqTransformer, folder: Path) -> Any:
    original.save(folder)
    register()
    return AutoModelForSeq2SeqLM.from_pretrained(folder, config=AutoConfig.from_pretrained(folder))


@pytest.mark.parametrize("form", FORMS)
def test_greedy_tokens_equal_the_slow_ones_in_chunks_and_beside_other_rows(form: str, tmp_path: Path) -> None:
    original = make_original(**FORMS[form])
    generator = torch.Generator().manual_seed(1)

    def random_ids(length: int) -> list[int]:
        return torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist()

    sources = [random_ids(length) for length in SOURCE_LENGTHS]
    prefixes = [[0, *random_ids(length - 1)] for length in PREFIX_LENGTHS]
    expected = [
        original.generate(
            torch.tensor([source]), torch.ones(1, len(source)), NUM_NEW_TOKENS, torch.tensor([prefix]), ignore_eos=True
        )[0]
        for source, prefix in zip(sources, prefixes, strict=True)
    ]
    assert len({tuple(row) for row in expected}) == len(expected) and len(set(expected[0])) > 9

    folder = export_graphs(load(original, tmp_path), tmp_path / "version")
    loop = Seq2SeqLoop(folder, num_rows=len(sources), max_len=48)
    for row, source in enumerate(sources):
        loop.place(row, source)
    chunks = [(len(prefix) - 2, 2) if len(prefix) > 3 else (len(prefix),) for prefix in prefixes]
    assert loop.greedy(prefixes, chunks, NUM_NEW_TOKENS) == expected

    nodes = Counter(node.op_type for node in onnx.load(str(folder / "model.onnx"), load_external_data=False).graph.node)
    num_layers = original.config.num_decoder_layers
    assert nodes["GroupQueryAttention"] == 2 * num_layers
    # Packed queries, keys and values; out; cross query, out; two of the feed-forward; and the head.
    assert nodes["MatMul"] == 6 * num_layers + 1


def test_the_model_in_transformers_form_computes_what_the_original_does(tmp_path: Path) -> None:
    original = make_original()
    model = load(original, tmp_path)
    assert isinstance(model, TorchTransformerForSeq2SeqLM) and model.config.is_encoder_decoder
    assert model.generation_config.decoder_start_token_id == original.config.decoder_start_token_id
    source = torch.randint(3, VOCAB_SIZE, (2, 11))
    mask = torch.ones_like(source)
    mask[1, 4:] = 0
    with torch.no_grad():
        expected = original(source, mask, source[:, :6])
        found = model(input_ids=source, attention_mask=mask, decoder_input_ids=source[:, :6]).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    plain = GenerationConfig(do_sample=False, max_new_tokens=6, pad_token_id=0)
    tokens = model.generate(input_ids=source, attention_mask=mask, generation_config=plain)
    assert tokens[:, 0].tolist() == [0, 0]
    assert tokens[:, 1:].tolist() == original.generate(source, mask, 6, ignore_eos=True)


def test_a_head_size_the_operator_cannot_take_is_refused(tmp_path: Path) -> None:
    model = load(make_original(hidden_size=48), tmp_path)
    with pytest.raises(UnsupportedArchitecture, match=r"heads of 12.*a multiple of 8"):
        measure(model)
