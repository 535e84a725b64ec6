"""The pretrain recipe as the worker runs it: a child process that prints events and leaves a folder, or nothing."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from control_plane.registry.garbage import HALF_MADE
from control_plane.training.config import PretrainConfig
from control_plane.training.events import Events
from control_plane.training.recipes import pretrain
from control_plane.training.tokenizer import train_tokenizer

pytestmark = pytest.mark.integration

TINY = {
    "vocab-size": 400,
    "hidden-size": 32,
    "intermediate-size": 64,
    "num-hidden-layers": 1,
    "num-attention-heads": 2,
    "num-key-value-heads": 1,
    "max-seq-length": 32,
    "per-device-train-batch-size": 4,
    "max-eval-tokens": 300,
    "warmup-steps": 2,
    "learning-rate": 0.02,
    "time-limit-s": 1000,
}
# OpenMP threads that spin while they wait make a busy machine several times slower.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def start(out: Path, *options: str) -> subprocess.Popen[str]:
    tiny = [f"--{name}={value}" for name, value in TINY.items()]
    command = [sys.executable, "-m", "control_plane.training.recipes.pretrain", str(out), *tiny, *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)


def finish(process: subprocess.Popen[str]) -> tuple[int, list[dict[str, Any]]]:
    stdout, _ = process.communicate(timeout=120)
    return process.returncode, [json.loads(line) for line in stdout.splitlines()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, list[dict[str, Any]]]]:
    """Two runs with the same seed: (folder, events) of each."""
    folder = tmp_path_factory.mktemp("pretrain")
    processes = {folder / name: start(folder / name, "--max-steps=20") for name in ("first", "second")}
    runs = []
    for out, process in processes.items():
        returncode, events = finish(process)
        assert returncode == 0, events
        runs.append((out, events))
    return runs


def test_events_tell_the_run(runs: list[tuple[Path, list[dict[str, Any]]]]) -> None:
    folder, events = runs[0]
    steps = [(event["step"], event["done"], event["total"]) for event in events if event["event"] == "step"]
    assert steps == [("corpus", 0, 5), ("tokenizer", 1, 5), ("train", 2, 5), ("evaluate", 3, 5), ("save", 4, 5)]
    assert events[0]["event"] == "started" and events[0]["max_steps"] == 20
    assert events[-1]["event"] == "finished" and events[-1]["folder"] == str(folder)
    assert events[-1]["num_steps"] == 20 and events[-1]["perplexity"] > 1


def test_loss_falls_on_trained_and_on_held_out_text(runs: list[tuple[Path, list[dict[str, Any]]]]) -> None:
    _, events = runs[0]
    trained = [event for event in events if event["event"] == "progress" and event["step"] == "train"]
    held_out = [event["perplexity"] for event in events if event["event"] == "metrics"]
    assert trained[0]["done"] == 1 and trained[-1]["done"] == 20
    assert trained[-1]["loss"] < trained[0]["loss"]
    assert held_out[-1] < held_out[0]
    assert set(trained[0]) == {"event", "step", "done", "total", "loss", "learning_rate", "tokens_per_s"}


def test_folder_is_a_hugging_face_checkpoint(runs: list[tuple[Path, list[dict[str, Any]]]]) -> None:
    folder, events = runs[0]
    expected = "README.md config.json generation_config.json model.safetensors tokenizer.json tokenizer_config.json"
    assert sorted(path.name for path in folder.iterdir()) == expected.split()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.num_parameters() == events[-1]["num_parameters"]
    assert model.dtype == torch.float32
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    inputs = tokenizer("The import statement 👍", return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4)
    assert tokens.shape[1] == inputs["input_ids"].shape[1] + 4


def test_same_seed_gives_the_same_weights(runs: list[tuple[Path, list[dict[str, Any]]]]) -> None:
    digests = [hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() for folder, _ in runs]
    assert digests[0] == digests[1]


def test_sigterm_while_training_leaves_nothing(tmp_path: Path) -> None:
    process = start(tmp_path / "starter", "--max-steps=1000000")
    assert process.stdout is not None
    for line in process.stdout:
        event = json.loads(line)
        if event["event"] == "progress" and event["step"] == "train":
            break
    assert [HALF_MADE.fullmatch(path.name)[1] for path in tmp_path.iterdir()] == [str(process.pid)]
    process.send_signal(signal.SIGTERM)
    returncode, events = finish(process)
    assert returncode == 1
    assert events[-1]["event"] == "error" and events[-1]["code"] == "CANCELLED"
    assert list(tmp_path.iterdir()) == []


def test_time_limit_ends_training_cleanly_and_is_told() -> None:
    config = PretrainConfig(
        **{name.replace("-", "_"): value for name, value in TINY.items()} | {"max_steps": 1000000, "time_limit_s": 4.0}  # type: ignore[arg-type]
    )
    tokenizer = train_tokenizer(["a few words for a small tokenizer"], config.vocab_size, 64)
    tokens, stream = torch.randint(0, 257, (1000,)), io.StringIO()
    events = Events(stream, pretrain.STEPS)
    num_steps = pretrain.train(
        pretrain.new_model(config, tokenizer), tokens, tokens[:100], config, time.monotonic(), events
    )
    last = json.loads(stream.getvalue().splitlines()[-1])
    assert (last["event"], last["code"]) == ("warning", "TIME_LIMIT")
    assert last["message"] == f"training ended after {num_steps} of 1000000 steps to keep within 4 s"


def test_no_time_for_one_step_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    returncode, events = finish(start(tmp_path / "starter", "--time-limit-s=1"))
    assert (returncode, events[-1]["code"]) == (1, "INVALID_OPTION")
    assert events[-1]["message"].startswith("time_limit_s has value 1, and no step could be trained")
    assert list(tmp_path.iterdir()) == []


def test_loss_that_is_not_finite_stops_the_run_and_leaves_nothing(tmp_path: Path) -> None:
    returncode, events = finish(start(tmp_path / "starter", "--learning-rate=1e30", "--max-steps=50"))
    assert returncode == 1
    assert events[-1]["event"] == "error" and events[-1]["code"] == "LOSS_NOT_FINITE"
    assert "start again with a learning_rate below 1e+30" in events[-1]["message"]
    assert list(tmp_path.iterdir()) == []


def test_taken_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("keep")
    returncode, events = finish(start(tmp_path))
    assert returncode == 1
    assert [event["code"] for event in events] == ["OUTPUT_EXISTS"]
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
