"""The seq2seq recipe as the worker runs it: a child process that prints events and leaves a folder, or nothing."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

from control_plane.registry.garbage import HALF_MADE
from control_plane.training.recipes.seq2seq_transformer import Seq2SeqTransformer

pytestmark = pytest.mark.integration

TINY = {
    "hidden-size": 32,
    "intermediate-size": 64,
    "num-encoder-layers": 1,
    "num-decoder-layers": 1,
    "num-attention-heads": 2,
    "per-device-train-batch-size": 16,
    "max-eval-pairs": 8,
    "warmup-steps": 10,
    "learning-rate": 0.01,
    "time-limit-s": 1000,
}
# OpenMP threads that spin while they wait make a busy machine several times slower.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Letters and what follows each of them."""
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    generator = torch.Generator().manual_seed(0)
    with path.open("w", encoding="utf-8") as stream:
        for _ in range(400):
            letters = torch.randint(4, (3,), generator=generator).tolist()
            source, target = ("".join(chr(ord(first) + letter) for letter in letters) for first in "ab")
            stream.write(json.dumps({"source": source, "target": target}) + "\n")
    return path


def start(out: Path, data: Path, *options: str) -> subprocess.Popen[str]:
    tiny = [f"--{name}={value}" for name, value in TINY.items()]
    command = [sys.executable, "-m", "control_plane.training.recipes.seq2seq", str(out), f"--data={data}", *tiny]
    return subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, list[dict[str, Any]]]:
    stdout, _ = process.communicate(timeout=200)
    return process.returncode, [json.loads(line) for line in stdout.splitlines()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, data: Path) -> list[tuple[Path, list[dict[str, Any]]]]:
    """Two runs with the same seed: (folder, events) of each."""
    folder = tmp_path_factory.mktemp("seq2seq")
    processes = {folder / name: start(folder / name, data, "--max-steps=60") for name in ("first", "second")}
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
    assert events[0]["event"] == "started" and events[0]["recipe"] == "seq2seq" and events[0]["max_steps"] == 60
    assert events[-1]["event"] == "finished" and events[-1]["folder"] == str(folder)
    assert events[-1]["num_steps"] == 60 and 0 <= events[-1]["exact_match"] <= 1


def test_loss_falls_and_accuracy_rises_on_held_out_pairs(runs: list[tuple[Path, list[dict[str, Any]]]]) -> None:
    _, events = runs[0]
    trained = [event for event in events if event["event"] == "progress" and event["step"] == "train"]
    held_out = [event for event in events if event["event"] == "metrics"]
    assert set(trained[0]) == {"event", "step", "done", "total", "loss", "learning_rate", "tokens_per_s"}
    assert trained[-1]["loss"] < trained[0]["loss"]
    assert held_out[-1]["loss"] < held_out[0]["loss"]
    assert held_out[-1]["token_accuracy"] > held_out[0]["token_accuracy"]


def test_folder_holds_the_model_and_a_tokenizer_that_ends_every_source(
    runs: list[tuple[Path, list[dict[str, Any]]]],
) -> None:
    folder, events = runs[0]
    expected = "README.md config.json generation_config.json model.safetensors tokenizer.json tokenizer_config.json"
    assert sorted(path.name for path in folder.iterdir()) == expected.split()
    model = Seq2SeqTransformer.load(folder)
    assert model.num_parameters == events[-1]["num_parameters"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("abc")["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id == model.config.eos_token_id and len(ids) == 4
    generation = GenerationConfig.from_pretrained(folder)
    assert generation.decoder_start_token_id == model.config.decoder_start_token_id
    assert len(model.generate(torch.tensor([ids]), torch.ones(1, 4), 5)) == 1


def test_same_seed_gives_the_same_weights(runs: list[tuple[Path, list[dict[str, Any]]]]) -> None:
    digests = [hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() for folder, _ in runs]
    assert digests[0] == digests[1]


def test_sigterm_while_training_leaves_nothing(tmp_path: Path, data: Path) -> None:
    process = start(tmp_path / "model", data, "--max-steps=1000000")
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


def test_no_time_for_one_step_is_an_error_and_leaves_nothing(tmp_path: Path, data: Path) -> None:
    returncode, events = finish(start(tmp_path / "model", data, "--time-limit-s=1"))
    assert (returncode, events[-1]["code"]) == (1, "INVALID_OPTION")
    assert events[-1]["message"].startswith("time_limit_s has value 1, and no step could be trained")
    assert list(tmp_path.iterdir()) == []


def test_loss_that_is_not_finite_stops_the_run_and_leaves_nothing(tmp_path: Path, data: Path) -> None:
    returncode, events = finish(start(tmp_path / "model", data, "--learning-rate=1e30", "--max-steps=50"))
    assert returncode == 1
    assert events[-1]["event"] == "error" and events[-1]["code"] == "LOSS_NOT_FINITE"
    assert "start again with a learning_rate below 1e+30" in events[-1]["message"]
    assert list(tmp_path.iterdir()) == []


def test_too_few_pairs_are_refused(tmp_path: Path) -> None:
    (tmp_path / "few.jsonl").write_text('{"source": "a", "target": "b"}\n')
    returncode, events = finish(start(tmp_path / "model", tmp_path / "few.jsonl"))
    assert returncode == 1
    assert events[-1]["code"] == "INVALID_DATA"
    assert "expected at least one batch of 16 and one held out" in events[-1]["message"]
    assert [path.name for path in tmp_path.iterdir()] == ["few.jsonl"]
