"""llmos itself: ``python -m exporters``, then the engine's own ModelRunner on the version folder.

The runner is what the engine drives in Triton; scheduling, sampling and text are not part of a step here, as they are
not in the peers. Greedy tokens are the first of the graph's own ``top_ids``. Serving is measured through a real Triton:
benchmarks/serving/triton.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.engines import Generate, Limits, Prompts, Unavailable, stepwise

MAX_MODEL_LEN = 2048
REJECTED = 3
"""Exit code of an export that is complete, but whose certificate failed."""


def export_command(checkpoint: Path, out: Path, precision: str) -> list[str]:
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    max_model_len = min(MAX_MODEL_LEN, config.get("max_position_embeddings", MAX_MODEL_LEN))
    options = ["--precision", precision, "--max-model-len", str(max_model_len), "--overwrite"]
    return [sys.executable, "-m", "exporters", str(checkpoint), str(out), *options]


def prepare(checkpoint: Path, out: Path, precision: str, options: Sequence[str] = ()) -> None:
    out.rmdir()
    command = [*export_command(checkpoint, out, precision), *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    events = [json.loads(line) for line in done.stdout.splitlines()]
    if done.returncode not in (0, REJECTED):
        last = events[-1] if events else {}
        raise Unavailable(f"export refused: {last.get('message', f'exit code {done.returncode}')}")


def load(checkpoint: Path, folder: Path, precision: str, limits: Limits) -> Generate:
    from triton_backend.config import VersionConfig
    from triton_backend.errors import VersionFolderError
    from triton_backend.model_runner import DecodeToken, ModelRunner

    try:
        config = VersionConfig.read(folder)
        engine = replace(config.engine, num_threads=limits.num_threads, max_num_seqs=limits.max_rows)
        runner = ModelRunner(folder, replace(config, engine=engine))
        runner.warm_up()
    except VersionFolderError as error:
        raise Unavailable(f"the engine refused the version: {error}") from error
    lengths: list[int] = []

    def newest() -> list[int]:
        tokens: list[int] = runner.outputs.top_ids[: len(lengths), 0].tolist()
        return tokens

    def prefill(prompts: Prompts) -> list[int]:
        lengths[:] = [len(prompt) for prompt in prompts]
        for row, prompt in enumerate(prompts):
            runner.prefill(row, prompt, 0, False)
        return newest()

    def step(tokens: list[int]) -> list[int]:
        runner.decode((DecodeToken(row, token, lengths[row]) for row, token in enumerate(tokens)), False)
        for row in range(len(lengths)):
            lengths[row] += 1
        return newest()

    return stepwise(prefill, step)
