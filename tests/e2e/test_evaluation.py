"""Evaluating a served model: lm-eval's numbers are those that follow from what the OpenAI client is told."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml

from control_plane.settings import PROJECT_ROOT

from .conftest import Stack

pytestmark = pytest.mark.e2e

CHOICES = [
    ("The import", ["statement", "purple"]),
    ("Changed in", ["banana", "version 3.8"]),
    ("Return the number", ["of", "xylophone"]),
    ("Added in", ["version", "giraffe"]),
]
PROMPTS = ["The import statement", "A function is", "Lists"]
DATA = {"dataset_path": "json", "test_split": "test", "doc_to_text": "{{text}}"}
TASKS: dict[str, dict[str, Any]] = {
    "words": {
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    },
    "going_on": {
        "output_type": "generate_until",
        "doc_to_target": "{{target}}",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def write_task(folder: Path, name: str, lines: list[dict[str, Any]]) -> str:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = {"task": name, "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}}, **DATA, **TASKS[name]}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return f"--task={folder / name}.yaml"


def test_lm_eval_finds_what_the_endpoint_says(stack: Stack, tmp_path: Path) -> None:
    stack.wait_loaded()
    with openai.OpenAI(base_url=f"{stack.web_url}/v1", api_key=stack.api_key) as client:

        def log_likelihood(text: str, choice: str) -> float:
            prompt = f"{text} {choice}"
            answer = client.completions.create(model=stack.model, prompt=prompt, echo=True, logprobs=1, max_tokens=0)
            found = answer.choices[0].logprobs
            pairs = zip(found.text_offset, found.token_logprobs, strict=True)
            return sum(logprob for offset, logprob in pairs if offset >= len(text))

        def going_on(text: str) -> str:
            answer = client.completions.create(model=stack.model, prompt=text, max_tokens=12, temperature=0, stop=["."])
            return answer.choices[0].text

        choices = [
            {"text": text, "choices": words, "answer": max((0, 1), key=lambda i: log_likelihood(text, words[i]))}
            for text, words in CHOICES
        ]
        answers = [{"text": text, "target": going_on(text)} for text in PROMPTS]
    choices[3]["answer"] = 1 - choices[3]["answer"]
    answers[2]["target"] += "?"
    tasks = (write_task(tmp_path, "words", choices), write_task(tmp_path, "going_on", answers))
    version = stack.settings.model_repository / stack.model / "1"
    command = [sys.executable, "-m", "control_plane.evaluation.lm_eval", f"--model={stack.model}", *tasks]
    result = subprocess.run(
        [*command, f"--version={version}", f"--url={stack.web_url}"],
        env={**stack.env, "LLMOS_API_KEY": stack.api_key},
        cwd=PROJECT_ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    last = json.loads(result.stdout.splitlines()[-1])
    assert last["metrics"]["words/acc"] == 0.75
    assert last["metrics"]["going_on/exact_match"] == pytest.approx(2 / 3)
    assert last["counts"] == {"words": 4, "going_on": 3}
    assert stack.api_key not in result.stdout + result.stderr
