"""onnxruntime-genai: its own model builder, then its Generator, one call per step over a shared cache.

Several clients are served in static batches by the Generator too. Its Engine batches continuously only over
PagedAttention, which the builder makes for CUDA and WebGPU alone; on CPU it runs static batches of four, whatever
``max_batch_size`` says. A batch of prompts of different lengths is padded on the right and needs a graph that computes
the head for every position, so there are two graphs:

    OUT/           head for the last position only: prompts of one length, and one client alone
    OUT/batched/   head for every position: prompts of different lengths
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.checkpoint import SPECIAL_TOKENS
from benchmarks.engines import Generate, Limits, Prompts, Unavailable, stepwise
from benchmarks.engines.closed_loop import Arrival, ClosedLoop, Serve

BUILDER = "onnxruntime_genai.models.builder"
SERVED_BY = "Generator, static batches by length"
RUNS_BATCHES = True
BATCHED = "batched"
PAD_TOKEN_ID = SPECIAL_TOKENS.index("<pad>")
MAX_BATCH_SIZE = 16
"""More rows make longer steps, but not so many more tokens a second as padding costs."""


def prepare(checkpoint: Path, out: Path, precision: str) -> None:
    # As in llmos, the head is computed for the last position of a prompt only.
    _build(checkpoint, out, precision, ["--extra_options", "prune_lm_head=true"])
    _build(checkpoint, out / BATCHED, precision, [])


def _build(checkpoint: Path, out: Path, precision: str, options: list[str]) -> None:
    command = [sys.executable, "-m", BUILDER, "-i", str(checkpoint), "-o", str(out), "-p", precision, "-e", "cpu"]
    command += ["-c", str(out / "cache"), *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise Unavailable(f"{BUILDER} failed: {(done.stdout.strip().splitlines() or ['no output'])[-1]}")


def load(checkpoint: Path, folder: Path, precision: str, limits: Limits) -> Generate:
    model = _model(folder, limits)
    running: list[Any] = []

    def prefill(prompts: Prompts) -> list[int]:
        running.clear()
        running.append(_generator(model, prompts, limits.max_tokens))
        return step([])

    def step(tokens: list[int]) -> list[int]:
        running[0].generate_next_token()
        return [int(token) for token in running[0].get_next_tokens()]

    return stepwise(prefill, step)


def serve(checkpoint: Path, folder: Path, precision: str, limits: Limits) -> Serve:
    loaded: list[tuple[bool, Any]] = []

    def serve_batches(loop: ClosedLoop) -> None:
        is_alone = loop.num_clients == 1
        if not loaded or loaded[0][0] != is_alone:
            loaded.clear()  # two models in one process would fight over the cores
            loaded.append((is_alone, _model(folder if is_alone else folder / BATCHED, limits)))
        while not loop.is_done:
            by_length = sorted(loop.arrivals(), key=lambda arrival: len(arrival.prompt))
            for first in range(0, len(by_length), MAX_BATCH_SIZE):
                _answer(loaded[0][1], loop, by_length[first : first + MAX_BATCH_SIZE])

    return serve_batches


def _answer(model: Any, loop: ClosedLoop, batch: Sequence[Arrival]) -> None:
    prompts = [arrival.prompt for arrival in batch]
    generator = _generator(model, prompts, max(map(len, prompts)) + loop.num_new)
    for _ in range(loop.num_new):
        generator.generate_next_token()
        for arrival, token in zip(batch, generator.get_next_tokens(), strict=True):
            loop.token(arrival.index, token)


def _generator(model: Any, prompts: Prompts, max_length: int) -> Any:
    import numpy as np
    import onnxruntime_genai as og

    params = og.GeneratorParams(model)
    params.set_search_options(
        batch_size=len(prompts),
        max_length=max_length,
        min_length=max_length,
        do_sample=False,
        past_present_share_buffer=True,
    )
    ids = np.full((len(prompts), max(map(len, prompts))), PAD_TOKEN_ID, dtype=np.int32)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    generator = og.Generator(model, params)
    generator.append_tokens(ids)
    return generator


def _model(folder: Path, limits: Limits) -> Any:
    import onnxruntime_genai as og

    config = og.Config(str(folder))
    options = {"intra_op_num_threads": limits.num_threads, "inter_op_num_threads": 1}
    # A pad token is what tells it where a shorter prompt ends.
    config.overlay(json.dumps({"model": {"pad_token_id": PAD_TOKEN_ID, "decoder": {"session_options": options}}}))
    return og.Model(config)
