"""Tasks of lm-eval are data: whatever would run code or load something from elsewhere is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from control_plane.evaluation.errors import InvalidTask
from control_plane.evaluation.task_files import read_task

pytestmark = pytest.mark.unit

TASK: dict[str, Any] = {
    "task": "capitals",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "data/capitals.jsonl"}},
    "test_split": "test",
    "doc_to_text": "{{question}}",
    "metric_list": [{"metric": "acc"}],
}


@pytest.fixture
def write(tmp_path: Path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "capitals.jsonl").write_text('{"question": "a"}\n')

    def write(content: Any) -> Path:
        path = tmp_path / "task.yaml"
        path.write_bytes(content if isinstance(content, bytes) else yaml.safe_dump(content).encode())
        return path

    return write


@pytest.mark.parametrize(
    "data_files", ["data/capitals.jsonl", ["data/capitals.jsonl"], {"test": "data/capitals.jsonl"}]
)
def test_data_is_found_from_the_tasks_own_folder(write, tmp_path, data_files):
    task = read_task(write({**TASK, "dataset_kwargs": {"data_files": data_files}}))
    data = tmp_path / "data" / "capitals.jsonl"
    assert task.config == {**TASK, "dataset_kwargs": {"data_files": {"test": [str(data)]}}}
    assert (task.name, task.data_files) == ("capitals", (data,))
    assert [len(file["sha256"]) for file in task.identity()["files"]] == [64, 64]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"task: x\nprocess_docs: !function utils.run", r"is not plain YAML without code \(.*!function"),
        (b"a: !!python/object/apply:os.system [id]", "is not plain YAML without code"),
        (b"a: [", "is not plain YAML"),
        (b"[" * 5000, "is not plain YAML"),
        (b"\xff", "cannot read the task"),
        (b"- a", "holds no YAML mapping"),
        (b"", "holds no YAML mapping"),
        ({**TASK, "class": "os.system"}, "has 'class', which would run code"),
        ({**TASK, "process_docs": "x"}, "has 'process_docs', which would run code"),
        ({**TASK, "include": "other.yaml"}, "has 'include'"),
        ({**TASK, "unsafe_code": True}, "has 'unsafe_code'"),
        ({**TASK, "doc_to_text": None}, "has no doc_to_text; expected task, dataset_path"),
        ({**TASK, "task": "a/b"}, "has task 'a/b'; expected letters"),
        ({**TASK, "task": ["a"]}, r"has task \['a'\]"),
        ({**TASK, "dataset_path": "EleutherAI/lambada_openai"}, "has dataset_path 'EleutherAI.*'; expected one of csv"),
        ({**TASK, "dataset_kwargs": {"data_files": "https://example.org/x.jsonl"}}, "names the data file 'https://"),
        ({**TASK, "dataset_kwargs": {"data_files": {"test": "nothing.jsonl"}}}, "names the data file 'nothing.jsonl'"),
        ({**TASK, "dataset_kwargs": {"data_dir": "data"}}, "has dataset_kwargs .*; expected {data_files"),
        ({**TASK, "dataset_kwargs": {"data_files": {"test": 5}}}, "has dataset_kwargs"),
        ({**TASK, "dataset_kwargs": {"data_files": []}}, "has dataset_kwargs"),
        ({**TASK, "metric_list": [{"metric": "acc", "hf_evaluate": True}]}, "has the metric .*hf_evaluate"),
        ({**TASK, "metric_list": [{"metric": "../evil.py"}]}, "has the metric"),
        ({**TASK, "fewshot_split": "train"}, "has fewshot_split 'train'; its data has test"),
        ({**TASK, "test_split": ["a"]}, r"has test_split \['a'\]"),
        ({**TASK, "metric_list": "acc"}, "has metric_list 'acc'; expected a list"),
        ({**TASK, "metric_list": {"metric": "acc"}}, "has metric_list .*; expected a list"),
        ({**TASK, "generation_kwargs": {"model": "chat@1"}}, "has generation_kwargs .*; expected only do_sample, "),
        ({**TASK, "generation_kwargs": ["until"]}, "has generation_kwargs"),
        ({**TASK, "dataset_kwargs": {"data_files": "a[1].jsonl"}}, r"expected a name without \* \? \[ \]"),
    ],
)
def test_a_task_that_cannot_be_used_is_refused_by_name(write, content, words):
    with pytest.raises(InvalidTask, match=words):
        read_task(write(content))


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InvalidTask, match=r"cannot read the task .*nothing\.yaml"):
        read_task(tmp_path / "nothing.yaml")
