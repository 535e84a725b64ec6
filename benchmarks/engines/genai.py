"""onnxruntime-genai: its own model builder, then its Generator, one call per step over a shared cache.

Several requests are served by its Engine. That batches continuously only over PagedAttention, which its builder makes
for CUDA and WebGPU alone; on CPU it runs static batches: what has arrived runs to its end before the next batch starts.
The Engine needs a graph that computes the head for the whole prompt, so there are two graphs:

    OUT/           head for the last position only: the Generator, and one client alone
    OUT/batched/   head for every position: the Engine
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.engines import Generate, Limits, Prompts, Unavailable, stepwise
from benchmarks.engines.closed_loop import Arrival, ClosedLoop, Serve

BUILDER = "onnxruntime_genai.models.builder"
SERVED_BY = "Engine, static batches; alone: Generator"
BATCHED = "batched"
MAX_EVENTS = 256


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
    import numpy as np
    import onnxruntime_genai as og

    model = _model(folder, limits)
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


def serve(checkpoint: Path, folder: Path, precision: str, limits: Limits) -> Serve:
    loaded: list[tuple[bool, Any]] = []

    def serve_clients(loop: ClosedLoop) -> None:
        is_alone = loop.num_clients == 1
        if not loaded or loaded[0][0] != is_alone:
            loaded.clear()  # two models in one process would fight over the cores
            loaded.append((is_alone, _model(folder if is_alone else folder / BATCHED, limits)))
        (_serve_alone if is_alone else _serve_batches)(loaded[0][1], loop)

    return serve_clients


def _serve_alone(model: Any, loop: ClosedLoop) -> None:
    import numpy as np
    import onnxruntime_genai as og

    while not loop.is_done:
        for arrival in loop.arrivals():
            params = og.GeneratorParams(model)
            length = len(arrival.prompt) + loop.num_new
            params.set_search_options(
                batch_size=1, max_length=length, min_length=length, do_sample=False, past_present_share_buffer=True
            )
            generator = og.Generator(model, params)
            generator.append_tokens(np.array([arrival.prompt], dtype=np.int32))
            is_last = False
            while not is_last:
                generator.generate_next_token()
                is_last = loop.token(arrival.index, generator.get_next_tokens()[0])


def _serve_batches(model: Any, loop: ClosedLoop) -> None:
    import onnxruntime_genai as og

    engine = og.Engine(model)
    events = engine.create_event_buffer(MAX_EVENTS)
    requests: dict[int, Any] = {}
    while not loop.is_done:
        requests |= {arrival.index: _begin(engine, arrival, loop.num_new) for arrival in loop.arrivals()}
        for event in engine.run(events):
            index = next(index for index, request in requests.items() if request == event.request)
            if event.flags.value & og.EngineEventFlags.FAILED.value:
                raise Unavailable(f"its Engine failed: {event.error_code}")
            if event.flags.value & og.EngineEventFlags.TOKEN.value and loop.token(index, event.token):
                requests.pop(index).close()


def _begin(engine: Any, arrival: Arrival, num_new: int) -> Any:
    import numpy as np
    import onnxruntime_genai as og

    options = og.RequestOptions()
    options.set_max_session_tokens(len(arrival.prompt) + num_new)
    request = engine.create_request(options=options)
    turn = og.TurnOptions(request)
    turn.set_do_sample(False)
    turn.set_max_generated_tokens(num_new)
    turn.set_min_generated_tokens(num_new)
    request.begin_turn(np.array(arrival.prompt, dtype=np.int32), turn)
    return request


def _model(folder: Path, limits: Limits) -> Any:
    import onnxruntime_genai as og

    config = og.Config(str(folder))
    options = {"intra_op_num_threads": limits.num_threads, "inter_op_num_threads": 1}
    engine = {"static_batching": {"max_batch_size": limits.max_rows}}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}, "engine": engine}))
    return og.Model(config)
