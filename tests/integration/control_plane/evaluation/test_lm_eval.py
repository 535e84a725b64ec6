"""lm-eval on /v1 of a scripted Triton: every token of a prompt has log probability −0.25, every answer is "w0 w1 …"."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from werkzeug.serving import make_server

from control_plane import create_app
from control_plane.auth.services import create_key
from control_plane.extensions import db
from control_plane.registry.places import Place
from control_plane.settings import PROJECT_ROOT, Settings
from control_plane.triton_fake import FakeTriton, word_by_word
from tests.served import say_loaded, serve
from triton_backend.version_folder import digest, seal

pytestmark = pytest.mark.integration

CHOICES: dict[str, Any] = {
    "task": "shorter",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "shorter.jsonl"}},
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "{{text}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc"}],
}
ANSWERS: dict[str, Any] = {
    "task": "answers",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "answers.jsonl"}},
    "output_type": "generate_until",
    "test_split": "test",
    "doc_to_text": "{{text}}",
    "doc_to_target": "{{target}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 3},
    "metric_list": [{"metric": "exact_match"}],
}


@dataclass(frozen=True)
class Server:
    url: str
    key: str
    triton: FakeTriton
    version: Path


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    version = tmp_path / "version"
    words = Tokenizer(models.WordLevel({"?": 0, "a": 1, "b": 2, "c": 3, "|": 4}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", eos_token="|").save_pretrained(version)
    (version / "model.json").write_text(json.dumps({"engine": {"max_model_len": 64}}))
    seal(version, {}, {})
    triton = FakeTriton({"words": word_by_word})
    settings = Settings.from_environment({"LLMOS_HOME": str(tmp_path / "home")})
    app = create_app(settings, triton)
    say_loaded(settings, Place("words", 1))
    with app.app_context():
        db.create_all()
        serve("words")
        key = create_key("test", "developer")
    http = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    yield Server(f"http://127.0.0.1:{http.port}", key, triton, version)
    http.shutdown()
    thread.join()


@pytest.fixture
def evaluate(server: Server, tmp_path: Path):
    """Task, lines of its data, options → exit code and events."""

    def evaluate(
        *tasks: tuple[dict[str, Any], list[Any]], key: str = server.key, url: str = server.url, **options: str
    ):
        command = [sys.executable, "-m", "control_plane.evaluation.lm_eval", f"--version={server.version}"]
        for task, lines in tasks:
            (tmp_path / f"{task['task']}.yaml").write_text(yaml.safe_dump(task))
            data = "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
            (tmp_path / f"{task['task']}.jsonl").write_text(data)
            command.append(f"--task={tmp_path / task['task']}.yaml")
        command += [f"--url={url}", *(f"--{name}={value}" for name, value in {"model": "words", **options}.items())]
        environment = {**os.environ, "LLMOS_API_KEY": key, "http_proxy": "http://127.0.0.1:1"}
        result = subprocess.run(command, env=environment, cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=120)
        assert not key or key not in result.stdout + result.stderr + " ".join(command)
        return result.returncode, [json.loads(line) for line in result.stdout.splitlines()]

    return evaluate


def test_choices_and_answers_are_scored_by_what_the_endpoint_says(evaluate, server: Server) -> None:
    choices = [{"text": "a b", "choices": ["c", "b c"], "answer": right} for right in (0, 0, 0, 1)]
    answers = [{"text": "a", "target": "w0 w1 w2 "}, {"text": "b", "target": "no"}, {"text": "c", "target": "w0"}]
    exit_code, events = evaluate((CHOICES, choices), (ANSWERS, answers))
    assert exit_code == 0, events
    assert [e.get("step") for e in events if e["event"] == "step"] == ["check", "load", "evaluate"]
    last = events[-1]
    assert last["event"] == "finished" and last["digest"] == digest(server.version)
    assert last["metrics"]["shorter/acc"] == 0.75
    assert last["metrics"]["shorter/acc_stderr"] == pytest.approx((0.75 * 0.25 / 3) ** 0.5)
    assert last["metrics"]["answers/exact_match"] == pytest.approx(1 / 3)
    assert last["counts"] == {"shorter": 4, "answers": 3}
    assert last["higher_is_better"] == {"shorter/acc": True, "answers/exact_match": True}
    scored = [call for call in server.triton.calls if "prompt_logprobs" in call.sampling]
    assert {call.input_ids for call in scored} == {(1, 2, 3), (1, 2, 2, 3)}
    assert [call.sampling["stop"] for call in server.triton.calls if call not in scored] == [["\n"]] * 3


def test_a_limit_is_kept(evaluate) -> None:
    exit_code, events = evaluate((CHOICES, [{"text": "a", "choices": ["c", "b c"], "answer": 0}] * 9), limit="2")
    assert (exit_code, events[-1]["counts"]) == (0, {"shorter": 2})


@pytest.mark.parametrize(
    ("task", "lines", "words"),
    [
        ({**ANSWERS, "doc_to_text": "{{nothing}}"}, [{"text": "a", "target": "b"}], "'nothing' is undefined"),
        ({**ANSWERS, "doc_to_text": "{{''.__class__.__mro__}}"}, [{"text": "a", "target": "b"}], "unsafe"),
        (
            {**ANSWERS, "metric_list": [{"metric": "bleurt"}]},
            [{"text": "a"}],
            "has the metric 'bleurt'; expected one of",
        ),
        ({**ANSWERS, "generation_kwargs": {"max_gen_toks": 63}}, [{"text": "a"}], "max_gen_toks from 1 to 62"),
        (ANSWERS, ['{"text": "a", "target": "b"}\n', "{broken\n"], "answers"),
    ],
)
def test_a_task_that_lm_eval_cannot_run_is_an_error_that_says_why(evaluate, task, lines, words) -> None:
    exit_code, events = evaluate((task, lines))
    assert (exit_code, events[-1]["event"], events[-1]["code"]) == (1, "error", "INVALID_TASK")
    assert words in events[-1]["message"]


def test_an_endpoint_that_refuses_is_quoted(evaluate, server: Server) -> None:
    task = (ANSWERS, [{"text": "a", "target": "b"}])

    def said(**changes: str) -> str:
        exit_code, events = evaluate(task, **changes)
        assert (exit_code, events[-1]["event"]) == (1, "error")
        return f"{events[-1]['code']} {events[-1]['message']}"

    assert "answered 401" in (wrong := said(key="llmos_a_b")) and "set LLMOS_API_KEY" in wrong
    assert "LLMOS_API_KEY is not set" in said(key="")
    assert "answered 404: model 'other' does not exist" in said(model="other")
    assert "ENDPOINT_FAILED no endpoint answers at http://127.0.0.1:1" in said(url="http://127.0.0.1:1")
    assert "INVALID_OPTION url has value 'x'" in said(url="x")
    assert "INVALID_OPTION limit has value 0" in said(limit="0")
    refused = {**ANSWERS, "generation_kwargs": {"until": ["."], "top_p": 7}}
    _, events = evaluate((refused, [{"text": "a", "target": "b"}]))
    assert events[-1]["code"] == "ENDPOINT_FAILED"
    assert "answered 400: top_p has value 7; expected a number from 0 to 1" in events[-1]["message"]
