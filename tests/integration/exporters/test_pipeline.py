"""Whole exports of every kind of model and precision: one call, a sealed version, a certificate that says how equal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, PreTrainedTokenizerFast

from exporters import ExportConfig, export
from exporters.errors import InvalidConfig
from tests.integration.exporters.conftest import VOCAB_SIZE
from triton_backend.config import VersionConfig
from triton_backend.version_folder import verify

pytestmark = pytest.mark.integration

BART: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": 1,
}
BERT: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
}


def save(model_type: str, sizes: dict[str, Any], auto_class: Any, folder: Path, tokenizer: Any) -> Path:
    torch.manual_seed(0)
    model = auto_class.from_config(AutoConfig.for_model(model_type, **sizes)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_an_encoder_decoder_becomes_two_proven_graphs(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    checkpoint = save("bart", BART, AutoModelForSeq2SeqLM, tmp_path / "bart", tokenizer)
    config = ExportConfig(str(checkpoint), tmp_path / "out", max_model_len=64, max_source_len=96, max_num_seqs=8)
    version = export(config)

    assert version.passed is True
    assert version.certificate["summary"]["num_mismatches"] == 0
    assert version.certificate["summary"]["num_prompts"] >= 16
    verify(version.folder)
    assert {"encoder.onnx", "encoder.onnx.data", "model.onnx", "model.onnx.data"} <= {
        path.name for path in version.folder.iterdir()
    }
    written = VersionConfig.read(version.folder)
    assert (written.model.kind, written.model.decoder_start_token_id) == ("encoder_decoder", 1)
    assert (written.model.forced_eos_token_id, written.model.source_vocab_size) == (1, None)
    assert (written.engine.max_source_len, written.engine.max_model_len) == (96, 64)
    assert set(version.sizes) == {"traced", "fused", "encoder"}


def test_tokens_that_the_original_never_chooses_are_never_chosen(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    checkpoint = save("bart", BART, AutoModelForSeq2SeqLM, tmp_path / "bart", tokenizer)
    path = checkpoint / "generation_config.json"
    # Every second token, so that the choice without the ban would differ.
    banned = list(range(3, VOCAB_SIZE, 2))
    path.write_text(json.dumps({**json.loads(path.read_text()), "bad_words_ids": [[token] for token in banned]}))
    version = export(ExportConfig(str(checkpoint), tmp_path / "out", max_model_len=64, max_source_len=96))

    found = {token for result in version.certificate["tokens"] for token in result["token_ids"]}
    assert version.certificate["summary"]["num_mismatches"] == 0
    assert found and not found & set(banned)


def test_a_model_that_never_chooses_its_padding_is_proven_equal(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    checkpoint = save("bart", BART, AutoModelForSeq2SeqLM, tmp_path / "bart", tokenizer)
    path = checkpoint / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "bad_words_ids": [[BART["pad_token_id"]]]}))
    version = export(ExportConfig(str(checkpoint), tmp_path / "out", max_model_len=64, max_source_len=96))

    assert version.passed is True
    assert version.certificate["text"]["max_difference_to_shipped_graph"] < 1e-4


def test_an_encoder_becomes_one_proven_graph(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    checkpoint = save("bert", BERT, AutoModel, tmp_path / "bert", tokenizer)
    version = export(ExportConfig(str(checkpoint), tmp_path / "out"))

    assert version.passed is True
    assert version.certificate["summary"]["min_cosine"] > 0.9999
    assert VersionConfig.read(version.folder).model.kind == "encoder"


@pytest.mark.parametrize("precision", ["int8", "int4", "fp16"])
def test_lower_precisions_come_with_a_measured_distance(
    precision: str, llama_checkpoint: Path, llama_version: Path, tmp_path: Path
) -> None:
    config = ExportConfig(
        str(llama_checkpoint), tmp_path / "out", max_model_len=48, max_num_seqs=4, precision=precision
    )
    version = export(config)

    summary = version.certificate["summary"]
    assert summary["kl_mean"] > 0
    assert 0 < summary["agreement"] <= 1
    assert summary["perplexity_ratio"] > 0
    assert {check["name"] for check in version.certificate["checks"]} >= {"max_kl_mean", "max_perplexity_ratio"}
    data = "model.onnx.data"
    assert (version.folder / data).stat().st_size < (llama_version / data).stat().st_size
    assert VersionConfig.read(version.folder).model.cache_type == ("fp16" if precision == "fp16" else "fp32")


def test_the_engine_runs_a_graph_with_adapter_slots_as_one_without(llama_checkpoint: Path, tmp_path: Path) -> None:
    config = ExportConfig(str(llama_checkpoint), tmp_path / "out", max_model_len=48, max_num_seqs=4, lora_slots=2)
    version = export(config)

    assert version.passed is True
    lora = VersionConfig.read(version.folder).model.lora
    assert lora is not None and (lora.num_slots, lora.rank, len(lora.targets)) == (2, 16, 8)


def test_calibration_text_reaches_the_quantizer(llama_checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "calibration.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20, encoding="utf-8")
    config = ExportConfig(
        str(llama_checkpoint), tmp_path / "out", max_model_len=48, max_num_seqs=4, precision="int8", calibration=text
    )
    assert export(config, certify=False).sizes["quantization"]["num_smoothed"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_slots": 1}, "lora_slots has value 1, but this is an encoder; expected a decoder"),
        ({"max_source_len": 8}, "max_source_len has value 8, but this encoder reads no source"),
    ],
)
def test_what_a_kind_of_model_cannot_have_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    checkpoint = save("bert", BERT, AutoModel, tmp_path / "bert", tokenizer)
    with pytest.raises(InvalidConfig, match=message):
        export(ExportConfig(str(checkpoint), tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_the_certificate_says_what_the_export_took(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    config = ExportConfig(str(make_checkpoint("llama", num_hidden_layers=1)), tmp_path / "out", max_model_len=48)
    version = export(config)
    document = json.loads((version.folder / "certificate.json").read_text())
    assert set(document["steps"]) >= {"load", "trace", "fuse", "save", "certify"}
    assert all(usage["peak_rss_bytes"] > 0 for usage in document["steps"].values())
    assert document["graph"]["fused"]["num_nodes_per_layer"] == 11
