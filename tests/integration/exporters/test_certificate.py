"""The proof, through the real engine, and the program that makes it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from transformers import PreTrainedTokenizerFast

import exporters.certificate
import exporters.logits
from exporters import ExportConfig, export
from exporters.certificate import certify
from exporters.checkpoint import open_checkpoint
from exporters.engine_process import EngineProcess
from exporters.errors import EngineFailed, InvalidCheckpoint, InvalidConfig
from exporters.events import Progress
from exporters.logits import ExportedGraph, original_logits
from exporters.reference_loop import export_graph
from exporters.thresholds import thresholds_for
from tests.integration.exporters.conftest import VOCAB_SIZE, make_model
from triton_backend.config import EngineConfig, LayerConfig, ModelConfig, VersionConfig
from triton_backend.version_folder import sha256_of, verify

pytestmark = pytest.mark.integration
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")

ROOT = Path(__file__).resolve().parents[3]


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "exporters", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


def run(*arguments: str) -> tuple[int, list[dict[str, Any]], str]:
    """(exit code, events, stderr); every line of stdout must be an event."""
    process = start(*arguments)
    stdout, stderr = process.communicate(timeout=280)
    return process.returncode, [json.loads(line) for line in stdout.splitlines()], stderr


def test_program_exports_proves_and_seals_a_version(llama_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "chat" / "1"
    exit_code, events, stderr = run(str(llama_checkpoint), str(out), "--max-model-len", "64", "--max-num-seqs", "8")
    assert exit_code == 0, stderr

    steps = [event["step"] for event in events if event["event"] == "step"]
    assert steps == ["check", "load", "trace", "fuse", "save", "certify", "seal"]
    assert (events[0]["event"], events[-1]["event"]) == ("started", "finished")
    progress = [event for event in events if event["event"] == "progress"]
    assert [event["done"] for event in progress] == list(range(1, progress[-1]["total"] + 1))
    assert events[-1]["passed"] is True
    assert events[-1]["folder"] == str(out)

    verify(out)
    certificate = json.loads((out / "certificate.json").read_text())
    assert certificate["passed"] is True
    assert certificate["summary"] == events[-1]["certificate"]
    assert certificate["summary"]["num_mismatches"] == 0
    assert certificate["summary"]["max_logit_difference"] < 1e-3
    assert len(certificate["tokens"]) >= 16
    assert min(result["num_prompt_tokens"] for result in certificate["tokens"]) == 1
    assert certificate["graph"] == events[-1]["graph"]
    assert certificate["graph"]["fused"]["num_nodes_per_layer"] < certificate["graph"]["traced"]["num_nodes_per_layer"]
    assert certificate["tokenizer"]["num_different"] == 0
    assert certificate["original_attention"] in ("sdpa", "eager")
    assert certificate["speed"]["decode_tokens_per_s"] > 0
    assert certificate["speed"]["prefill_tokens_per_s"] > 0
    assert certificate["memory"]["peak_rss_bytes"] > certificate["memory"]["size_bytes"]
    assert certificate["memory"]["export_peak_rss_bytes"] > certificate["memory"]["size_bytes"]
    assert list(certificate["steps"]) == ["check", "load", "trace", "fuse", "save", "certify"]
    assert all(step["seconds"] >= 0 and step["peak_rss_bytes"] > 0 for step in certificate["steps"].values())


def proof(folder: Path, checkpoint: Path, precision: str = "fp32", **changes: float) -> dict[str, Any]:
    progress = Progress(lambda event: None, ("certify",))
    limits = thresholds_for(precision, changes)
    certificate = certify(folder, open_checkpoint(str(checkpoint)), None, progress, limits)
    json.dumps(certificate, allow_nan=False)
    return certificate


def failed(certificate: dict[str, Any]) -> set[str]:
    return {check["name"] for check in certificate["checks"] if not check["passed"]}


def test_a_version_of_other_weights_does_not_pass(llama_version: Path, make_checkpoint: Callable[..., Path]) -> None:
    certificate = proof(llama_version, make_checkpoint("llama", seed=1))
    assert certificate["passed"] is False
    assert certificate["summary"]["num_mismatches"] > 0
    mismatch = next(result for result in certificate["tokens"] if result["result"] == "mismatch")
    assert mismatch["expected"] != mismatch["found"]
    assert abs(mismatch["logit_gap"]) >= certificate["thresholds"]["tie_logit_gap"]


def with_noise(version: Path, folder: Path, scale: float) -> Path:
    """A copy of ``version`` with every matrix changed by ``scale`` of itself, as rounding would."""
    shutil.copytree(version, folder)
    model = onnx.load(folder / "model.onnx")
    generator = np.random.default_rng(0)
    for tensor in model.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if values.dtype == np.float32 and values.ndim == 2:
            noisy = values * (1 + scale * generator.standard_normal(values.shape))
            tensor.CopyFrom(onnx.numpy_helper.from_array(noisy.astype(np.float32), tensor.name))
    (folder / "model.onnx.data").unlink()
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data")
    return folder


def test_lower_precision_passes_or_fails_by_thresholds_on_text(
    llama_version: Path, llama_checkpoint: Path, tmp_path: Path
) -> None:
    rounded = proof(with_noise(llama_version, tmp_path / "good", 1e-4), llama_checkpoint, "int8")
    assert rounded["passed"] is True
    assert 0 < rounded["summary"]["kl_mean"] < rounded["summary"]["kl_p99"]
    assert rounded["summary"]["perplexity_ratio"] == pytest.approx(1, abs=0.01)
    assert rounded["summary"]["perplexity_ratio"] != 1

    broken = proof(with_noise(llama_version, tmp_path / "bad", 0.5), llama_checkpoint, "int8")
    assert broken["passed"] is False
    assert {"min_agreement", "min_text_agreement", "max_kl_mean", "max_kl_p99"} <= failed(broken)
    assert set(broken["summary"]["failed"]) == failed(broken)
    assert broken["agreement"] < broken["thresholds"]["min_agreement"]


def test_thresholds_decide_and_are_recorded(llama_version: Path, llama_checkpoint: Path) -> None:
    certificate = proof(llama_version, llama_checkpoint, max_kl_mean=0)
    assert failed(certificate) == {"max_kl_mean"}
    assert certificate["passed"] is False
    assert certificate["thresholds"]["max_kl_mean"] == 0
    assert certificate["generate"] == {"num_prompts": 2, "num_new_tokens": 24, "num_equal": 2}
    assert certificate["text"]["max_difference_to_shipped_graph"] == 0
    for result in certificate["tokens"]:
        assert len(result["prompt_ids"]) == result["num_prompt_tokens"]
        assert result["top"][0][0] == result["token_ids"][0]
    assert certificate["logits"]["num_positions"] > 500


def test_every_reason_to_fail_has_a_name(
    llama_version: Path, llama_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporters.certificate, "num_tokenized_differently", lambda *args: 1)
    monkeypatch.setattr(exporters.certificate, "generate", lambda model, config, passage, num_new: [0] * num_new)
    certificate = proof(llama_version, llama_checkpoint, tie_logit_gap=0)
    assert certificate["passed"] is False
    assert set(certificate["summary"]["failed"]) == {"texts_tokenized_differently", "prompts_generated_differently"}
    assert certificate["text"]["max_difference_to_shipped_graph"] == 0, "which is as far as a gap of 0 allows"


def test_a_text_may_hold_tokens_that_are_never_chosen(
    make_checkpoint: Callable[..., Path], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint("llama", num_hidden_layers=1)
    path = checkpoint / "generation_config.json"
    suppressed = tokenizer("e of the")["input_ids"]
    settings = {"suppress_tokens": suppressed, "bad_words_ids": [[1]], "min_length": 3}
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    version = export(ExportConfig(str(checkpoint), tmp_path / "out", max_model_len=48, max_num_seqs=8))
    assert version.passed is True, version.certificate["summary"]["failed"]
    assert not {token for result in version.certificate["tokens"] for token in result["token_ids"]} & set(suppressed)
    assert not {token for result in version.certificate["tokens"] for token, _ in result["top"]} & set(suppressed)
    assert 1 < version.certificate["text"]["perplexity_original"] < 1e9
    assert version.certificate["ignored_generation_settings"] == {"min_length": 3}
    config = VersionConfig.read(tmp_path / "out")
    assert set(config.model.suppressed_token_ids) == set(suppressed), "an end that is a bad word still ends"


def test_an_evaluation_text_of_one_s_own_is_used(llama_version: Path, llama_checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Alle Menschen sind frei und gleich geboren. " * 3)
    progress = Progress(lambda event: None, ("certify",))
    certificate = certify(llama_version, open_checkpoint(str(llama_checkpoint)), None, progress, eval_text=text)
    assert certificate["text"]["sha256"] == sha256_of(text)
    assert certificate["text"]["num_tokens"] < 200
    text.write_text(" ")
    with pytest.raises(InvalidConfig, match="is empty"):
        certify(llama_version, open_checkpoint(str(llama_checkpoint)), None, progress, eval_text=text)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_logits_of_every_position_are_those_of_the_shipped_graph(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(name)
    export_graph(model, tmp_path)
    sizes = ModelConfig(name, name, VOCAB_SIZE, 256, (LayerConfig(1, 16),), 64)
    config = VersionConfig(sizes, EngineConfig(64))
    monkeypatch.setattr(exporters.logits, "CHUNK_LOGITS_BYTES", 4 * VOCAB_SIZE * 13)
    ids = list(range(5, 45))
    chunks = list(ExportedGraph(tmp_path, config).chunks(ids))
    assert [len(chunk) for chunk in chunks] == [13, 13, 14], "no chunk of one token"
    every = np.concatenate(chunks)
    assert np.array_equal(every[[0, 20, 39]], ExportedGraph(tmp_path, config).at(ids, [0, 20, 39]))
    np.testing.assert_allclose(every, original_logits(model, ids).numpy(), atol=1e-4)
    assert original_logits(model, ids, keep=3).shape == (3, VOCAB_SIZE)


def test_an_engine_that_cannot_load_the_version_is_reported_with_its_words(llama_version: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(llama_version, broken)
    (broken / "model.json").write_text("{}")
    with EngineProcess(broken) as engine, pytest.raises(EngineFailed, match=r"model\.json"):
        engine.submit("1", [5], 1)
        engine.receive()


@without_gpu
def test_a_version_for_cuda_is_not_begun_where_it_cannot_be_proven(llama_checkpoint: Path, tmp_path: Path) -> None:
    asked = ExportConfig(str(llama_checkpoint), tmp_path / "1", device="cuda", precision="bf16")
    with pytest.raises(InvalidConfig, match=r"finds no CUDA device here .* --no-certify .* llmos verify"):
        export(asked)
    assert list(tmp_path.iterdir()) == []


@without_gpu
def test_the_engine_says_that_a_version_needs_a_gpu(
    llama_version: Path, llama_checkpoint: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(llama_version, tmp_path / "version"))
    document = json.loads((folder / "model.json").read_text())
    document["model"] |= {"precision": "bf16", "cache_type": "bf16"}
    document["engine"] |= {"device": "cuda"}
    (folder / "model.json").write_text(json.dumps(document))
    with pytest.raises(EngineFailed, match=r"device has value 'cuda', but .* no CUDA device; use a machine with one"):
        proof(folder, llama_checkpoint, "bf16")


def test_a_request_the_engine_refuses_is_reported(llama_version: Path) -> None:
    with EngineProcess(llama_version) as engine, pytest.raises(EngineFailed, match="refused request 'too-large'"):
        engine.submit("too-large", [VOCAB_SIZE + 5], 1)
        engine.receive()


def test_a_refused_checkpoint_ends_with_an_error_event(tmp_path: Path) -> None:
    exit_code, events, _ = run(str(tmp_path), str(tmp_path / "out"))
    assert exit_code == 1
    assert events[-1]["event"] == "error"
    assert events[-1]["code"] == "INVALID_CHECKPOINT"
    assert "config.json" in events[-1]["message"]
    assert list(tmp_path.iterdir()) == []


def test_wrong_usage_ends_with_exit_code_2_and_prints_no_event() -> None:
    assert run("only-one-argument")[:2] == (2, [])


def test_a_signal_cancels_the_export_and_removes_what_it_wrote(llama_checkpoint: Path, tmp_path: Path) -> None:
    process = start(str(llama_checkpoint), str(tmp_path / "out"))
    # In the middle of tracing, which runs generated code.
    assert process.stdout is not None
    for line in process.stdout:
        if json.loads(line).get("step") == "trace":
            break
    assert len(list(tmp_path.iterdir())) == 1
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGTERM)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert json.loads(rest.splitlines()[-1])["code"] == "CANCELLED"
    assert list(tmp_path.iterdir()) == []


def test_a_hub_model_that_cannot_be_fetched_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InvalidCheckpoint, match="nobody/nothing is neither a folder nor a model that could be fetched"):
        open_checkpoint("nobody/nothing")
