"""A plan says what the export then makes, without loading weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, AutoModelForSeq2SeqLM, PreTrainedTokenizerFast

import exporters.dry_run
from exporters import ExportConfig
from exporters.decoder import measure
from exporters.dry_run import Plan, measure_bandwidth, plan
from exporters.errors import ExportError, InvalidCheckpoint, InvalidConfig, OutputExists
from exporters.seq2seq import measure as seq2seq_measure
from tests.integration.exporters.conftest import make_model
from tests.integration.exporters.test_seq2seq import BART_SIZES, T5_SIZES
from triton_backend.config import VersionConfig

pytestmark = pytest.mark.integration


@pytest.fixture(autouse=True)
def known_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporters.dry_run, "measure_bandwidth", lambda: 1e9)


def planned(checkpoint: Path, **settings: Any) -> Plan:
    return plan(ExportConfig(str(checkpoint), checkpoint.parent / "out", **settings))


def test_a_plan_tells_the_size_of_the_version_and_its_cache(llama_version: Path, llama_checkpoint: Path) -> None:
    found = planned(llama_checkpoint, max_model_len=48, max_num_seqs=4)
    config = VersionConfig.read(llama_version)
    weights = (llama_version / "model.onnx.data").stat().st_size
    assert found.folder_bytes == pytest.approx(weights, rel=0.02)
    assert (found.architecture, found.kind, found.num_layers) == ("LlamaForCausalLM", "decoder", 2)
    per_token = sum(2 * 4 * layer.num_kv_heads * layer.head_size for layer in config.model.layers)
    assert found.cache_bytes_per_row == per_token * 48
    assert found.cache_bytes == found.cache_bytes_per_row * 5, "the health probe has a row of its own"
    assert (found.max_model_len, found.max_num_seqs) == (48, 4)
    assert found.num_parameters == sum(w.size for w in load_file(llama_checkpoint / "model.safetensors").values())
    assert not (llama_checkpoint.parent / "out").exists()


def test_a_step_reads_products_but_not_the_table_that_is_looked_up(make_checkpoint: Callable[..., Path]) -> None:
    untied, tied = planned(make_checkpoint("llama")), planned(make_checkpoint("llama_tied_biased"))
    table = 4 * 320 * 64
    assert untied.folder_bytes - untied.bytes_per_decode_step == pytest.approx(table, rel=0.05)
    assert tied.folder_bytes - tied.bytes_per_decode_step < table / 10
    assert untied.decode_step_s == untied.bytes_per_decode_step / 1e9


def test_lower_precision_is_smaller_and_adapters_need_memory(llama_checkpoint: Path) -> None:
    sizes = [planned(llama_checkpoint, precision=name).bytes_per_decode_step for name in ("fp32", "int8", "int4")]
    assert sizes[0] > 3.5 * sizes[1] > 3.5 * 1.5 * sizes[2]
    adapters = planned(llama_checkpoint, lora_slots=3, lora_rank=8, lora_targets=("q_proj", "v_proj"))
    assert adapters.lora_bytes == 4 * 4 * 8 * 2 * ((64 + 64) + (64 + 32))
    with pytest.raises(InvalidConfig, match="lora_targets has value nosuch"):
        planned(llama_checkpoint, lora_slots=1, lora_targets=("nosuch",))


def test_a_plan_refuses_what_the_export_would_refuse(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = make_checkpoint("llama")
    with pytest.raises(InvalidConfig, match="max_model_len has value 257"):
        planned(checkpoint, max_model_len=257)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputExists):
        plan(ExportConfig(str(checkpoint), tmp_path / "file"))
    weights = load_file(checkpoint / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**weights, name: weights[name][:-1].copy()}, checkpoint / "model.safetensors", {"format": "pt"})
    with pytest.raises(InvalidCheckpoint, match=rf"{name} has shape \[127, 64\] .* expects \[128, 64\]"):
        planned(checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "model_type": "hal9000"}))
    with pytest.raises(ExportError, match="hal9000"):
        planned(checkpoint)


def test_a_plan_lists_what_the_engine_will_not_do(make_checkpoint: Callable[..., Path]) -> None:
    checkpoint = make_checkpoint("llama")
    (checkpoint / "generation_config.json").write_text('{"min_new_tokens": 3, "temperature": 0.5}')
    assert planned(checkpoint).ignored_settings == {"min_new_tokens": 3}
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "hidden_act": "nope"}))
    with pytest.raises(InvalidCheckpoint, match="KeyError: 'nope'"):
        planned(checkpoint)


@pytest.mark.parametrize("name", ["gemma3", "qwen3", "gpt2", "phi3", "mistral_window"])
def test_caches_are_those_that_the_export_measures(name: str, make_checkpoint: Callable[..., Path]) -> None:
    layers = measure(make_model(name)).layers
    per_token = sum(2 * 4 * layer.num_kv_heads * layer.head_size for layer in layers)
    found = planned(make_checkpoint(name))
    assert (found.num_layers, found.cache_bytes_per_row) == (len(layers), per_token * found.max_model_len)


@pytest.mark.parametrize(("name", "sizes"), [("bart", BART_SIZES), ("t5", T5_SIZES)])
def test_an_encoder_decoder_has_a_second_cache_for_its_source(
    name: str, sizes: dict[str, Any], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(name, **sizes))
    model.save_pretrained(tmp_path / name)
    tokenizer.save_pretrained(tmp_path / name)
    found = planned(tmp_path / name, max_model_len=48, max_source_len=40)
    layers = seq2seq_measure(model).layers
    per_token = sum(2 * 4 * layer.num_kv_heads * layer.head_size for layer in layers)
    assert (found.kind, found.num_layers) == ("encoder_decoder", len(layers))
    assert found.cache_bytes_per_row == per_token * (48 + 40)
    assert (
        found.bytes_per_decode_step
        < found.folder_bytes
        - 4 * sum(parameter.numel() for parameter in model.get_encoder().parameters() if parameter.dim() > 1)
        + 4 * model.get_input_embeddings().weight.numel()
    )


def test_memory_bandwidth_is_measured() -> None:
    assert 1e8 < measure_bandwidth() < 1e13
