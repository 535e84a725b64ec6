"""Tasks of lm-eval as YAML files with data beside them, read so that nothing else is: no hub, and no code.

    task: capitals                       dataset_path: json
    output_type: multiple_choice         dataset_kwargs: {data_files: {test: capitals.jsonl}}
    doc_to_text: "{{question}}"          test_split: test

The format is lm-eval's own (https://github.com/EleutherAI/lm-evaluation-harness/blob/main/docs/task_guide.md), one
task a file. What would run Python (``!function``, ``process_docs``, ``class``, …) or load something from elsewhere is
refused; data files are found from the YAML file's own folder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from control_plane.evaluation.errors import InvalidTask
from triton_backend.version_folder import sha256_of

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
BUILDERS = ("csv", "json", "parquet", "text")
"""What reads local files, of the datasets library's builders."""
SPLITS = ("test_split", "validation_split", "training_split", "fewshot_split")
GENERATION = ("do_sample", "max_gen_toks", "seed", "temperature", "top_k", "top_p", "until")
REQUIRED = ("task", "dataset_path", "dataset_kwargs", "doc_to_text")
ALLOWED = (
    *REQUIRED,
    "description",
    "doc_to_choice",
    "doc_to_target",
    "fewshot_config",
    "fewshot_delimiter",
    "fewshot_split",
    "filter_list",
    "gen_prefix",
    "generation_kwargs",
    "metadata",
    "metric_list",
    "num_fewshot",
    "output_type",
    "repeats",
    "target_delimiter",
    "task_alias",
    "test_split",
    "training_split",
    "validation_split",
)


@dataclass(frozen=True)
class TaskFile:
    """``config`` is what lm-eval gets: the YAML with the paths of its data made absolute."""

    name: str
    path: Path
    config: Mapping[str, Any]
    data_files: tuple[Path, ...]

    def identity(self) -> dict[str, Any]:
        files = [{"path": str(path), "sha256": sha256_of(path)} for path in (self.path, *self.data_files)]
        return {"task": self.name, "files": files}


def read_task(path: Path) -> TaskFile:
    """Raises InvalidTask that names the file, the key and what is allowed."""
    document = _document(path)
    unknown = [key for key in document if key not in ALLOWED]
    if unknown:
        raise InvalidTask(
            f"{path} has {unknown[0]!r}, which would run code, load something from elsewhere, or is no key of a task; "
            f"expected only {', '.join(sorted(ALLOWED))}"
        )
    missing = [key for key in REQUIRED if not document.get(key)]
    if missing:
        raise InvalidTask(f"{path} has no {missing[0]}; expected {', '.join(REQUIRED)}")
    name = document["task"]
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise InvalidTask(f"{path} has task {name!r:.200}; expected letters, digits, '.', '_' and '-'")
    _check_metrics(path, document.get("metric_list"))
    _check_generation(path, document.get("generation_kwargs"))
    data_files = _data_files(path, document)
    for key in SPLITS:
        if document.get(key) not in (None, *data_files):
            raise InvalidTask(f"{path} has {key} {document[key]!r:.200}; its data has {', '.join(data_files)}")
    files = [file for split in data_files.values() for file in split]
    splits = {split: [str(file) for file in found] for split, found in data_files.items()}
    return TaskFile(name, path, {**document, "dataset_kwargs": {"data_files": splits}}, tuple(files))


def _document(path: Path) -> dict[str, Any]:
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidTask(f"cannot read the task {path} ({error}); expected a YAML file") from error
    except (yaml.YAMLError, RecursionError) as error:
        said = " ".join(str(error).split())
        raise InvalidTask(f"{path} is not plain YAML without code ({said:.300}); see lm-eval's task guide") from error
    if not isinstance(document, dict) or not all(isinstance(key, str) for key in document):
        raise InvalidTask(f"{path} holds no YAML mapping; expected keys such as task, dataset_path and doc_to_text")
    return document


def _check_metrics(path: Path, metrics: Any) -> None:
    """A metric is one of lm-eval's own; ``hf_evaluate`` would load a script from the hub or from a path."""
    if metrics is not None and not isinstance(metrics, list):
        raise InvalidTask(f"{path} has metric_list {metrics!r:.200}; expected a list")
    for metric in metrics or ():
        name = metric.get("metric") if isinstance(metric, dict) else None
        if not isinstance(name, str) or not NAME.fullmatch(name) or metric.get("hf_evaluate"):
            raise InvalidTask(f"{path} has the metric {metric!r:.200}; expected {{metric: a name that lm-eval has}}")


def _check_generation(path: Path, settings: Any) -> None:
    """Anything else would become a field of the request, such as the model that is asked."""
    if settings is not None and not (isinstance(settings, dict) and set(settings) <= set(GENERATION)):
        raise InvalidTask(f"{path} has generation_kwargs {settings!r:.200}; expected only {', '.join(GENERATION)}")


def _data_files(path: Path, document: Mapping[str, Any]) -> dict[str, list[Path]]:
    if document["dataset_path"] not in BUILDERS:
        raise InvalidTask(
            f"{path} has dataset_path {document['dataset_path']!r:.200}; expected one of {', '.join(BUILDERS)}, with "
            "local files in dataset_kwargs: {data_files: …}"
        )
    settings = document["dataset_kwargs"]
    given = settings.get("data_files") if isinstance(settings, dict) and set(settings) == {"data_files"} else None
    splits = given if isinstance(given, dict) else {str(document.get("test_split") or "test"): given}
    found: dict[Any, list[Any]] = {
        split: files if isinstance(files, list) else [files] for split, files in splits.items()
    }
    names = [name for files in found.values() for name in files]
    if not names or not all(isinstance(name, str) and name for name in (*found, *names)):
        raise InvalidTask(f"{path} has dataset_kwargs {settings!r:.200}; expected {{data_files: {{split: file}}}}")
    for name in names:
        if set(name) & set("*?[]"):
            raise InvalidTask(f"{path} names the data file {name!r:.300}; expected a name without * ? [ ]")
        if not (path.parent / name).is_file():
            raise InvalidTask(f"{path} names the data file {name!r:.300}; expected a file, found from {path.parent}")
    return {split: [(path.parent / name).resolve() for name in files] for split, files in found.items()}
