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

import pytest

from exporters.certificate import _compare_tokens, _generate, certify
from exporters.checkpoint import open_checkpoint
from exporters.engine_process import EngineProcess
from exporters.errors import EngineFailed, InvalidCheckpoint
from exporters.events import Progress
from exporters.prompts import Prompt
from tests.integration.exporters.conftest import VOCAB_SIZE, make_model
from triton_backend.version_folder import verify

pytestmark = pytest.mark.integration

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
    assert certificate["tokenizer"]["equal"] is True
    assert certificate["original_attention"] in ("sdpa", "eager")
    assert certificate["speed"]["decode_tokens_per_s"] > 0
    assert certificate["speed"]["prefill_tokens_per_s"] > 0
    assert certificate["memory"]["peak_rss_bytes"] > certificate["memory"]["size_bytes"]


def test_a_version_of_other_weights_does_not_pass(llama_version: Path, make_checkpoint: Callable[..., Path]) -> None:
    other = open_checkpoint(str(make_checkpoint("llama", seed=1)))
    certificate = certify(llama_version, other, None, Progress(lambda event: None, ("certify",)))
    assert certificate["passed"] is False
    assert certificate["summary"]["num_mismatches"] > 0
    mismatch = next(result for result in certificate["tokens"] if result["result"] == "mismatch")
    assert mismatch["expected"] != mismatch["found"]
    assert abs(mismatch["logit_gap"]) >= certificate["thresholds"]["tie_logit_gap"]


def test_tokens_of_nearly_equal_logits_are_a_tie_and_end_the_comparison() -> None:
    model = make_model("llama")
    prompt = Prompt("tie", (20, 30, 40), num_new_tokens=4)
    expected = _generate(model, prompt)
    twin = next(token for token in range(VOCAB_SIZE) if token not in expected)
    model.lm_head.weight.data[twin] = model.lm_head.weight.data[expected[1]] * (1 - 1e-5)
    assert _generate(model, prompt) == expected

    tie = _compare_tokens(model, prompt, (expected[0], twin, 5, 5))
    assert (tie.result, tie.num_equal, tie.position, tie.found) == ("tie", 1, 1, twin)
    assert tie.logit_gap == pytest.approx(0, abs=1e-3)
    mismatch = _compare_tokens(model, prompt, (expected[0], expected[1], (expected[2] + 1) % 100, 5))
    assert (mismatch.result, mismatch.position) == ("mismatch", 2)
    assert _compare_tokens(model, prompt, expected[:3]).result == "mismatch"
    assert _compare_tokens(model, prompt, expected).result == "equal"


def test_an_engine_that_cannot_load_the_version_is_reported_with_its_words(llama_version: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(llama_version, broken)
    (broken / "model.json").write_text("{}")
    with EngineProcess(broken) as engine, pytest.raises(EngineFailed, match=r"model\.json"):
        engine.submit("1", [5], 1)
        engine.receive()


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
