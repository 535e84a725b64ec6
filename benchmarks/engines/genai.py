"""onnxruntime-genai: its own model builder, then its Generator, one call per step over a shared cache."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.engines import Generate, Limits, Prompts, Unavailable, stepwise

BUILDER = "onnxruntime_genai.models.builder"


def prepare(checkpoint: Path, out: Path, precision: str) -> None:
    command = [sys.executable, "-m", BUILDER, "-i", str(checkpoint), "-o", str(out), "-p", precision, "-e", "cpu"]
    # As in llmos, the head is computed for the last position of a prompt only.
    command += ["-c", str(out / "cache"), "--extra_options", "prune_lm_head=true"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise Unavailable(f"{BUILDER} failed: {(done.stdout.strip().splitlines() or ['no output'])[-1]}")


def load(checkpoint: Path, folder: Path, precision: str, limits: Limits) -> Generate:
    import numpy as np
    import onnxruntime_genai as og

    config = og.Config(str(folder))
    options = {"intra_op_num_threads": limits.num_threads, "inter_op_num_threads": 1}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    model = og.Model(config)
    running: list[Any] = []

    def prefill(prompts: Prompts) -> list[int]:
        running.clear()
        params = og.GeneratorParams(model)
        params.set_search_options(
            batch_size=len(prompts),
            max_length=limits.max_tokens,
            min_length=limits.max_tokens,
            do_sample=False,
            past_present_share_buffer=True,
        )
        running.append(og.Generator(model, params))
        running[0].append_tokens(np.array(prompts, dtype=np.int32))
        return step([])

    def step(tokens: list[int]) -> list[int]:
        running[0].generate_next_token()
        return [int(token) for token in running[0].get_next_tokens()]

    return stepwise(prefill, step)
