"""One engine in a process of its own: ``python -m benchmarks.worker TASK`` with TASK as JSON, its result as JSON.

    {"do": "prepare", "engine": …, "checkpoint": …, "folder": …}           → {}
    {"do": "tokens", …, "limits": {…}, "batches": […], "num_new": N}       → {"tokens": […], "versions": {…}}
    {"do": "judge", …, "limits": {…}, "prompts": […], "texts": […]}        → {"judged": [[rank, gap], …]}
    {"do": "time", …, "limits": {…}, "rows": […], "context": C, "prefill": P, "steps": N, "warmup_steps": N,
     "prefills": N, "vocab_size": V}                                       → {"decode_ms": {…}, "prefill_ms": …, …}
    {"do": "serve", …, "limits": {…}, "workloads": [{…Workload…}]}         → {"runs": [[{…Answer…}]], "versions": …, …}
    {"do": "beam", …, "limits": {…}, "workload": {…}, "width": W, "repeats": N}  → {"seconds": […], "tokens": […], …}

The result is the only line on stdout; what libraries print goes to stderr. An engine that cannot do what is asked
answers {"unavailable": reason}.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import os
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.checkpoint import random_prompts
from benchmarks.engines import ENGINES, EngineSpec, Generate, Limits, Unavailable
from benchmarks.engines.closed_loop import ClosedLoop
from benchmarks.serving.workload import Workload


def main(task: dict[str, Any]) -> dict[str, Any]:
    spec = ENGINES[task["engine"]]
    checkpoint, folder = Path(task["checkpoint"]), Path(task["folder"])
    try:
        module = importlib.import_module(f"benchmarks.engines.{spec.module}")
        if task["do"] == "prepare":
            module.prepare(checkpoint, folder, spec.precision)
            return {}
        if task["do"] == "judge":
            limits = Limits(**task["limits"])
            return {"judged": module.judge(checkpoint, task["prompts"], task["texts"], limits)}
        if task["do"] in SERVING:
            return SERVING[task["do"]](module, spec, task)
        generate = module.load(checkpoint, folder, spec.precision, Limits(**task["limits"]))
    except Unavailable as reason:
        return {"unavailable": str(reason)}
    except ImportError as error:
        return {"unavailable": f"{error}"}
    if task["do"] == "tokens":
        texts = [generate(batch, task["num_new"]).tokens for batch in task["batches"]]
        return {
            "tokens": [tokens for batch in texts for tokens in batch],
            "versions": {package: version(package) for package in spec.packages},
        }
    return measure(generate, task)


def measure(generate: Generate, task: dict[str, Any]) -> dict[str, Any]:
    """Medians of this process, in ms: one decode step for each number of rows, and the prefill of one long prompt.

    Warm-up steps come first and end where the context has the wanted length; they are not counted, and neither is the
    first prefill.
    """
    warmup, steps, vocab_size = task["warmup_steps"], task["steps"], task["vocab_size"]
    decode_ms = {}
    for num_rows in task["rows"]:
        prompts = random_prompts(vocab_size, num_rows, task["context"] - warmup)
        marks = generate(prompts, 1 + warmup + steps).marks_s[1 + warmup :]
        decode_ms[str(num_rows)] = 1e3 * statistics.median(b - a for a, b in itertools.pairwise(marks))
    prompt = random_prompts(vocab_size, 1, task["prefill"])
    runs = [generate(prompt, 1).marks_s for _ in range(1 + task["prefills"])][1:]
    return {
        "decode_ms": decode_ms,
        "prefill_ms": 1e3 * statistics.median(marks[1] - marks[0] for marks in runs),
        "peak_rss_bytes": peak_rss_bytes(),
    }


def serve(module: Any, spec: EngineSpec, task: dict[str, Any]) -> dict[str, Any]:
    """Answer each workload by the engine's own interface, after a short one that is not counted.

    Where a batch must end before the next begins, all waves of several clients take the same time, and one is measured.
    """
    answer = module.serve(*_place(task), spec.precision, Limits(**task["limits"]))
    runs = []
    for workload in (Workload(**values) for values in task["workloads"]):
        if getattr(module, "RUNS_BATCHES", False) and workload.num_clients > 1:
            workload = dataclasses.replace(workload, waves=1)
        for each in (workload.warm_up, workload):
            loop = ClosedLoop(each.prompts, each.num_clients, each.num_new)
            answer(loop)
        runs.append([dataclasses.asdict(reply) for reply in loop.answers])
    return {"runs": runs, "served_by": module.SERVED_BY, **_facts(spec)}


def search_beams(module: Any, spec: EngineSpec, task: dict[str, Any]) -> dict[str, Any]:
    """Seconds that a beam search over all prompts of the workload at once took, each time, and its best beams."""
    search = module.beam_search(*_place(task), spec.precision, Limits(**task["limits"]))
    workload, width = Workload(**task["workload"]), task["width"]
    search(workload.warm_up.prompts, width, workload.warm_up.num_new)
    seconds = []
    for _ in range(task["repeats"]):
        started_s = time.perf_counter()
        tokens = search(workload.prompts, width, workload.num_new)
        seconds.append(time.perf_counter() - started_s)
    return {"seconds": seconds, "tokens": tokens, "served_by": "its beam search, one batch", **_facts(spec)}


SERVING = {"serve": serve, "beam": search_beams}


def _place(task: dict[str, Any]) -> tuple[Path, Path]:
    return Path(task["checkpoint"]), Path(task["folder"])


def _facts(spec: EngineSpec) -> dict[str, Any]:
    return {
        "versions": {package: version(package) for package in spec.packages},
        "peak_rss_bytes": peak_rss_bytes(),
    }


def peak_rss_bytes(pid: int | str = "self") -> int:
    """Of a process; getrusage's number would begin with the parent's, which is kept over exec."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")))


if __name__ == "__main__":
    result_stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    result_stream.write(json.dumps(main(json.loads(sys.argv[1]))) + "\n")
    result_stream.flush()
