"""One engine in a process without Triton, with timers around its methods: ``python -m benchmarks.serving.engine_steps
TASK`` with TASK as JSON, its result as JSON.

    {"folder", "num_rows", "num_new", "num_threads", "sampling": {…}}  → {"step": ms, "graph": ms, …, "num_steps": N}
"""

from __future__ import annotations

import functools
import json
import os
import queue
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.checkpoint import random_prompts

PROMPT_TOKENS = 16


class Timers:
    """Seconds that named methods took, per step of the engine. The engine runs in one thread, and so do they."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._current: dict[str, float] = defaultdict(float)

    def wrap(self, owner: type, method: str) -> None:
        """What an engine has no method for is part of the step all the same, and a dash in the table of parts."""
        original: Callable[..., Any] | None = getattr(owner, method, None)
        if original is None:
            return

        @functools.wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            started_s = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                self._current[method.removeprefix("_")] += time.perf_counter() - started_s

        setattr(owner, method, timed)

    def wrap_step(self, owner: type, method: str) -> None:
        """Close a step's account where the next one begins, so that what happens between two steps is in it."""
        original: Callable[..., Any] = getattr(owner, method)

        @functools.wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._current["ended"] = started_s = time.perf_counter()
            self.steps.append(dict(self._current))
            self._current.clear()
            self._current["began"] = started_s
            return original(*args, **kwargs)

        setattr(owner, method, timed)

    def medians_ms(self) -> dict[str, float]:
        """Of steps that decoded and computed no prompt; the first and the last ones are not like the others."""
        steps = [step for step in self.steps if "began" in step and "decode" in step and "prefill" not in step][2:-2]
        names = sorted({name for step in steps for name in step} - {"began", "ended", "decode"})
        found = {name: 1e3 * statistics.median(step.get(name, 0.0) for step in steps) for name in names}
        found["graph"] = 1e3 * statistics.median(step["decode"] for step in steps)
        found["step"] = 1e3 * statistics.median(step["ended"] - step["began"] for step in steps)
        return {**found, "num_steps": len(steps)}


class LastResponses:
    """Where all requests' responses go; hands over the last one of each."""

    def __init__(self) -> None:
        self.last: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def send(self, response: Any) -> None:
        if response.finished:
            self.last.put(response)

    def is_cancelled(self) -> bool:
        return False

    def is_behind(self) -> bool:
        return False


def main(task: dict[str, Any]) -> dict[str, float]:
    import torch

    from triton_backend.adapter_store import AdapterStore
    from triton_backend.config import VersionConfig
    from triton_backend.engine import Engine
    from triton_backend.model_runner import ModelRunner
    from triton_backend.protocol import GenerateRequest
    from triton_backend.sampler import Sampler
    from triton_backend.sampling_params import SamplingParams
    from triton_backend.scheduler import Scheduler
    from triton_backend.tokenizer import Tokenizer

    timers = Timers()
    for owner, methods in (
        (ModelRunner, ("decode", "prefill")),
        (Scheduler, ("schedule",)),
        (Sampler, ("sample",)),
        (Engine, ("_append", "_update", "_receive")),
    ):
        for method in methods:
            timers.wrap(owner, method)
    timers.wrap_step(Engine, "step")
    torch.set_num_threads(1)  # as the engine does when it is loaded
    folder = Path(task["folder"])
    config = VersionConfig.read(folder)
    settings = replace(config.engine, num_threads=task["num_threads"], max_num_seqs=task["num_rows"])
    config = replace(config, engine=settings)
    adapters = AdapterStore(folder.parent / "adapters", "")
    engine = Engine(config, ModelRunner(folder, config), Tokenizer(folder), adapters)
    engine.start()
    sink = LastResponses()
    prompts = random_prompts(config.model.vocab_size, task["num_rows"], PROMPT_TOKENS)
    for index, prompt in enumerate(prompts):
        sampling = {"max_tokens": task["num_new"], "ignore_eos": True, "seed": index, **task["sampling"]}
        params = SamplingParams.from_mapping(sampling)
        engine.submit(GenerateRequest(str(index), params, input_ids=tuple(prompt), stream=True), sink)
    errors = [error for _ in prompts if (error := sink.last.get().error)]
    engine.stop()
    if errors:
        raise SystemExit(errors[0])
    return timers.medians_ms()


if __name__ == "__main__":
    result_stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # the engine's log goes to standard output unless it is configured
    result_stream.write(json.dumps(main(json.loads(sys.argv[1]))) + "\n")
    result_stream.flush()
