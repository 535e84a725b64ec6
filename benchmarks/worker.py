"""One engine in a process of its own: ``python -m benchmarks.worker TASK`` with TASK as JSON, its result as JSON.

    {"do": "prepare", "engine": …, "checkpoint": …, "folder": …}           → {}
    {"do": "tokens", …, "limits": {…}, "batches": […], "num_new": N}       → {"tokens": […], "versions": {…}}
    {"do": "judge", …, "limits": {…}, "prompts": […], "texts": […]}        → {"judged": [[rank, gap], …]}
    {"do": "time", …, "limits": {…}, "rows": […], "context": C, "prefill": P, "steps": N, "warmup_steps": N,
     "prefills": N, "vocab_size": V}                                       → {"decode_ms": {…}, "prefill_ms": …, …}

The result is the only line on stdout; what libraries print goes to stderr. An engine that cannot do what is asked
answers {"unavailable": reason}.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import statistics
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.checkpoint import random_prompts
from benchmarks.engines import ENGINES, Generate, Limits, Unavailable


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


def peak_rss_bytes() -> int:
    """Of this process; getrusage's number would begin with the parent's, which is kept over exec."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")))


if __name__ == "__main__":
    result_stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    result_stream.write(json.dumps(main(json.loads(sys.argv[1]))) + "\n")
    result_stream.flush()
