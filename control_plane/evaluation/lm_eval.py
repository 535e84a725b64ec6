"""``python -m control_plane.evaluation.lm_eval --model NAME --version FOLDER --task FILE``: lm-eval on an endpoint.

lm-eval (https://github.com/EleutherAI/lm-evaluation-harness) asks /v1/completions of a running llmos; tasks and data
are local files, and nothing is fetched. The API key comes from the environment variable LLMOS_API_KEY, never from the
command line, where other users of the machine could read it.

{"event": "started", "suite": "lm-eval", "model": …, "url": …, "tasks": […]}
{"event": "step", "step": "check" | "load" | "evaluate", "done": 0, "total": 3}
{"event": "progress", "step": "evaluate", "done": 120, "total": 400}                       requests
{"event": "finished", "suite": "lm-eval", "model": …, "digest": …, "metrics": {"capitals/acc": 0.75,
 "capitals/acc_stderr": 0.25, …}, "counts": {"capitals": 4}, "higher_is_better": {"capitals/acc": true},
 "settings": {…}, "data": [{"task": …, "files": [{"path": …, "sha256": …}]}]}

A metric is called "task/metric", with ",filter" behind it where the task has filters. What lm-eval means by it is
defined in its ``lm_eval/api/metrics.py``: ``acc`` the fraction of documents whose likeliest choice is the right one,
``acc_norm`` the same with log likelihoods per byte of the choice, ``exact_match`` the fraction of generated answers
equal to the target, ``…_stderr`` the standard error of a mean. Exit codes: 0 evaluated · 1 failed · 2 wrong usage.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import NoReturn

from control_plane.evaluation.endpoint import Endpoint
from control_plane.evaluation.errors import (
    EvaluationCancelled,
    EvaluationError,
    InvalidOption,
    InvalidTask,
    NotInstalled,
)
from control_plane.evaluation.task_files import read_task
from control_plane.training.events import Events, events_on_stdout
from triton_backend.errors import VersionFolderError
from triton_backend.version_folder import digest

STEPS = ("check", "load", "evaluate")
API_KEY = "LLMOS_API_KEY"
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def evaluate(endpoint: Endpoint, task_paths: Sequence[Path], limit: int | None, events: Events) -> None:
    """Run the tasks and emit the events; raises EvaluationError."""
    tasks = [read_task(path) for path in task_paths]
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise InvalidTask(f"two task files have the same task name; expected different ones, got {', '.join(names)}")
    events.emit("started", suite="lm-eval", model=endpoint.model, url=endpoint.url, tasks=names)
    events.step("check")
    if find_spec("lm_eval") is None:
        raise NotInstalled("lm-eval is not installed; install llmos with its extra: pip install 'llmos[eval]'")
    version_digest = _digest(endpoint)
    endpoint.check()
    with tempfile.TemporaryDirectory(prefix="llmos-lm-eval-") as caches:
        os.environ |= {**OFFLINE, "HF_HOME": caches, "TOKENIZERS_PARALLELISM": "false"}
        events.step("load")
        from control_plane.evaluation import harness

        events.step("evaluate")
        results = harness.run(endpoint, tasks, limit, events.progress)
    events.emit(
        "finished",
        suite="lm-eval",
        model=endpoint.model,
        digest=version_digest,
        metrics=dict(results.metrics),
        counts=dict(results.num_documents),
        higher_is_better=dict(results.higher_is_better),
        settings={**results.settings, "limit": limit},
        data=[task.identity() for task in tasks],
    )


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    events = events_on_stdout(STEPS)
    signal.signal(signal.SIGTERM, _cancel)
    signal.signal(signal.SIGINT, _cancel)
    try:
        if options.limit is not None and options.limit < 1:
            raise InvalidOption(f"limit has value {options.limit}; expected a whole number ≥ 1")
        endpoint = Endpoint(options.url.rstrip("/"), options.model, options.version, _api_key())
        evaluate(endpoint, options.task, options.limit, events)
    except (EvaluationError, EvaluationCancelled) as error:
        events.emit("error", code=error.code, message=str(error))
        return 1
    except Exception as error:
        traceback.print_exc()
        events.emit("error", code=EvaluationError.code, message=f"{type(error).__name__}: {error}")
        return 1
    return 0


def _api_key() -> str:
    key = os.environ.pop(API_KEY, "")
    if not key:
        raise InvalidOption(f"{API_KEY} is not set; set it to an API key: llmos keys create NAME --role developer")
    return key


def _digest(endpoint: Endpoint) -> str:
    try:
        assert endpoint.max_model_len
        return digest(endpoint.version)
    except VersionFolderError as error:
        raise InvalidOption(f"version has value {str(endpoint.version)!r}: {error.args[0]}") from error


def _cancel(signum: int, frame: FrameType | None) -> NoReturn:
    raise EvaluationCancelled(f"{signal.Signals(signum).name} stopped the evaluation")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m control_plane.evaluation.lm_eval",
        description="Run tasks of lm-eval on a served model.",
        epilog=f"The API key is read from the environment variable {API_KEY}.",
    )
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:8080", help="where llmos answers (default: %(default)s)")
    add("--model", required=True, metavar="NAME", help="served model to ask")
    add(
        "--version", required=True, type=Path, metavar="FOLDER", help="version folder that it serves, for its tokenizer"
    )
    add("--task", required=True, type=Path, metavar="FILE", action="append", help="task of lm-eval as YAML; repeatable")
    add("--limit", type=int, metavar="N", help="most documents of each task")
    return parser


if __name__ == "__main__":
    sys.exit(main())
