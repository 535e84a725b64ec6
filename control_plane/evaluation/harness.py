"""lm-eval itself, run on an endpoint. The only file that imports it, after ``lm_eval`` has made it stay offline.

Requests are those of lm-eval's ``local-completions`` model: token ids with ``echo`` and ``logprobs`` for choices, stop
strings for generated answers. Some run at once; what one gives never depends on the others.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import aiohttp
import lm_eval.utils
from jinja2.sandbox import ImmutableSandboxedEnvironment
from lm_eval.api.instance import Instance
from lm_eval.api.registry import metric_registry
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager

from control_plane.evaluation.endpoint import Endpoint, refusal
from control_plane.evaluation.errors import EndpointFailed, EvaluationError, InvalidTask
from control_plane.evaluation.task_files import TaskFile

CONCURRENCY = 8
BOOTSTRAP_ROUNDS = 1000
TIMEOUT_S = 600
MAX_NEW_TOKENS = 256
"""Of an answer whose task names no ``max_gen_toks``, as in lm-eval, where the model's context has room for them."""
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Results:
    """``metrics`` by "task/metric"; ``num_documents`` by task; ``higher_is_better`` by "task/metric"."""

    metrics: Mapping[str, float]
    num_documents: Mapping[str, int]
    higher_is_better: Mapping[str, bool]
    settings: Mapping[str, Any]


class EndpointModel(LocalCompletionsAPI):
    """lm-eval's client with our errors and progress; used by the one thread that runs lm-eval."""

    def __init__(self, endpoint: Endpoint, on_progress: OnProgress) -> None:
        super().__init__(
            base_url=f"{endpoint.url}/v1/completions",
            model=endpoint.model,
            tokenizer=str(endpoint.version),
            tokenizer_backend="huggingface",
            max_length=endpoint.max_model_len,
            num_concurrent=CONCURRENCY,
            timeout=TIMEOUT_S,
            max_gen_toks=min(MAX_NEW_TOKENS, endpoint.max_model_len // 2),
            header={"Authorization": f"Bearer {endpoint.api_key}"},
        )
        # A prompt begins as the model's own tokenizer begins a text.
        self.add_bos_token = bool(self.tokenizer("")["input_ids"])
        self._on_progress = on_progress
        self._num_done = self._num_requests = 0

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self._num_requests += len(requests)
        return super().loglikelihood(requests, disable_tqdm)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        self._num_requests += len(requests)
        return super().generate_until(requests, disable_tqdm)

    async def amodel_call(
        self,
        session: Any,
        sem: Any,
        messages: Any,
        *,
        generate: bool = True,
        cache_keys: Any = None,
        ctxlens: list[int] | None = None,
        gen_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """One request; lm-eval tries three times before an error counts."""
        payload = self._create_payload(
            self.create_message(messages), generate=generate, gen_kwargs=copy.deepcopy(gen_kwargs), seed=self._seed
        )
        try:
            async with sem, session.post(self.base_url, json=payload, headers=self.header) as response:
                if response.status != 200:
                    raise EndpointFailed(refusal(self.base_url, response.status, await response.text()))
                outputs = await response.json()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise EndpointFailed(f"the endpoint {self.base_url} broke off: {error!r}") from error
        self._num_done += 1
        self._on_progress(self._num_done, max(self._num_requests, self._num_done))
        if generate:
            return self.parse_generations(outputs)
        return self.parse_logprobs(outputs, tokens=messages, ctxlens=ctxlens)


def run(endpoint: Endpoint, tasks: Sequence[TaskFile], limit: int | None, on_progress: OnProgress) -> Results:
    """Evaluate every task; raises InvalidTask, EndpointFailed."""
    for task in tasks:
        _check(task, endpoint.max_model_len)
    # lm-eval's own environment lets a template reach Python's internals.
    sandbox = ImmutableSandboxedEnvironment(undefined=lm_eval.utils.env.undefined, keep_trailing_newline=True)
    sandbox.filters["regex_replace"] = lm_eval.utils.regex_replace
    lm_eval.utils.env = sandbox
    try:
        results = simple_evaluate(
            EndpointModel(endpoint, on_progress),
            tasks=[copy.deepcopy(dict(task.config)) for task in tasks],
            task_manager=TaskManager(include_defaults=False),
            limit=limit,
            bootstrap_iters=BOOTSTRAP_ROUNDS,
            log_samples=False,
        )
    except EvaluationError:
        raise
    except Exception as error:
        names = ", ".join(task.name for task in tasks)
        raise InvalidTask(f"lm-eval cannot run {names}: {_reasons(error)}; correct the task or its data") from error
    assert results is not None, "lm-eval gives results to its first rank, and we have one"
    return _results(results)


def _check(task: TaskFile, max_model_len: int) -> None:
    """What lm-eval would notice late, or not at all: with no room for a prompt it sends an empty one."""
    for metric in task.config.get("metric_list") or ():
        if metric["metric"] not in metric_registry:
            known = ", ".join(sorted(metric_registry))
            raise InvalidTask(f"{task.path} has the metric {metric['metric']!r}; expected one of {known}")
    settings = task.config.get("generation_kwargs") or {}
    length = settings.get("max_gen_toks", 1) if isinstance(settings, dict) else None
    if not isinstance(length, int) or not 1 <= length < max_model_len - 1:
        raise InvalidTask(
            f"{task.path} has generation_kwargs {settings!r:.200}; expected a mapping with max_gen_toks from 1 to "
            f"{max_model_len - 2}, since the model's context is {max_model_len} tokens"
        )


def _results(results: Mapping[str, Any]) -> Results:
    metrics: dict[str, float] = {}
    higher_is_better: dict[str, bool] = {}
    for task, values in results["results"].items():
        for key, value in values.items():
            name, _, filter_name = key.partition(",")
            if not filter_name or isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            full_name = f"{task}/{name}" if filter_name == "none" else f"{task}/{name},{filter_name}"
            metrics[full_name] = float(value)
            better = results["higher_is_better"].get(task, {}).get(name)
            if better is not None:
                higher_is_better[full_name] = bool(better)
    return Results(
        metrics=metrics,
        num_documents={task: int(count["effective"]) for task, count in results["n-samples"].items()},
        higher_is_better=higher_is_better,
        settings={"lm_eval": version("lm_eval"), "num_fewshot": dict(results["n-shot"])},
    )


def _reasons(error: BaseException) -> str:
    """The error and what caused it, in one line."""
    said: list[str] = []
    cause: BaseException | None = error
    while cause is not None and len(said) < 3:
        said.append(f"{type(cause).__name__}: {' '.join(str(cause).split())[:300]}")
        cause = cause.__cause__
    return " ← ".join(said)
