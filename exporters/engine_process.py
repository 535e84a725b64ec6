"""The engine as a child process: ``python -m triton_backend FOLDER``, JSON lines in and out.

A process of its own keeps ONNX Runtime's threads away from PyTorch's and makes what is certified the same program that
serves. The child ends when its stdin is closed, also when that is because we died.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from exporters.errors import EngineFailed, RequestRefused
from exporters.prompts import Prompt
from exporters.usage import peak_rss_bytes_of
from triton_backend.config import VersionConfig

GREEDY = {"temperature": 0, "ignore_eos": True, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
"""Explicit, because a version's own generation_config would fill in what a request leaves out."""


@dataclass(frozen=True)
class EngineAnswer:
    """What one request gave: its tokens, their text and the engine's timing (``prefill_s``, ``decode_s``, …).

    ``prompt_logprobs``, if asked for, are those of the prompt's tokens from the second on.
    """

    request_id: str
    token_ids: tuple[int, ...]
    metrics: Mapping[str, Any]
    text: str = ""
    prompt_logprobs: tuple[float, ...] = ()


@dataclass(frozen=True)
class EngineRun:
    """Tokens of every prompt, in order, with the measured ``speed`` and the engine's peak memory."""

    tokens: tuple[tuple[int, ...], ...]
    speed: Mapping[str, Any]
    peak_rss_bytes: int | None


class EngineProcess:
    """A running engine. ``peak_rss_bytes`` is known once it has ended."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stderr = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (closed in __exit__)
        # The child must find our packages whether they are installed or run from a source folder.
        sources = str(Path(__file__).resolve().parent.parent)
        path = os.pathsep.join(filter(None, (sources, os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "triton_backend", str(folder), "--unsealed"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": path},
        )
        self.peak_rss_bytes: int | None = None
        # Answers are taken as they come: an engine that waits for us to read them would not read what we write.
        self._answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, name="engine-answers", daemon=True)
        self._reader.start()

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._process.returncode is None:
            self._process.kill()
            self._process.wait()
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._reader.join()
        self._process.stdout.close()
        self._stderr.close()

    def submit(self, request_id: str, input_ids: Sequence[int], num_new_tokens: int) -> None:
        sampling = {**GREEDY, "max_tokens": num_new_tokens}
        self.ask(request_id, {"input_ids": list(input_ids), "sampling_parameters": sampling})

    def ask(self, request_id: str, request: Mapping[str, Any]) -> None:
        """Send any request that ``python -m triton_backend`` reads."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"id": request_id, **request}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failed("ended before it took a request") from None

    def receive(self) -> EngineAnswer:
        """Wait for the next request to finish; raises RequestRefused, or EngineFailed if the engine ended."""
        line = self._answers.get()
        if line is None:
            self._answers.put(None)
            raise self._failed("ended before it answered every request")
        try:
            answer = json.loads(line)
            if "error" in answer:
                raise RequestRefused(str(answer.get("id")), str(answer["error"]))
            output = answer["outputs"][0]
            return EngineAnswer(
                str(answer["id"]),
                tuple(output["token_ids"]),
                dict(answer.get("metrics") or {}),
                output["text"],
                tuple(answer.get("prompt_logprobs", ())[1:]),
            )
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise self._failed(f"answered {line[:200]!r}, which is not a response ({error!r})") from error

    def finish(self) -> None:
        """Let the engine end by itself; raises EngineFailed if it does not do so with exit code 0."""
        assert self._process.stdin is not None
        self.peak_rss_bytes = peak_rss_bytes_of(self._process.pid)
        self._process.stdin.close()
        self._reader.join()
        self._process.wait()
        if self._process.returncode != 0:
            raise self._failed(f"ended with exit code {self._process.returncode}")

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):  # responses are JSON objects; anything else was printed by a library
                self._answers.put(line)
        self._answers.put(None)

    def _failed(self, what: str) -> EngineFailed:
        self._stderr.flush()
        self._stderr.seek(0)
        last_lines = " | ".join(self._stderr.read().strip().splitlines()[-5:])
        return EngineFailed(f"the engine on {self._folder} {what}; its last words: {last_lines or '(none)'}")


def run_prompts(
    folder: Path,
    config: VersionConfig,
    prompts: Sequence[Prompt],
    on_done: Callable[[], None] = lambda: None,
    *,
    measure: bool = True,
) -> EngineRun:
    """Greedy tokens of all ``prompts`` at once, by the engine on ``folder``; raises EngineFailed."""
    with EngineProcess(folder) as engine:
        speed = _measure_speed(engine, config) if measure else {}
        tokens: dict[int, tuple[int, ...]] = {}
        started_s = time.monotonic()
        for index, prompt in enumerate(prompts):
            engine.submit(str(index), prompt.ids, prompt.num_new_tokens)
        for _ in prompts:
            answer = engine.receive()
            tokens[int(answer.request_id)] = answer.token_ids
            on_done()
        elapsed_s = time.monotonic() - started_s
        speed["batch_tokens_per_s"] = round(sum(map(len, tokens.values())) / elapsed_s, 1)
        engine.finish()
    return EngineRun(tuple(tokens[index] for index in range(len(prompts))), speed, engine.peak_rss_bytes)


def _measure_speed(engine: EngineProcess, config: VersionConfig) -> dict[str, Any]:
    """Tokens per second of one request alone, after a short one that warms up."""
    generator = np.random.default_rng(1)
    max_model_len = config.engine.max_model_len
    num_prompt, num_new = max_model_len // 2, min(64, max_model_len // 4)
    if config.engine.max_source_len:
        num_prompt, num_new = config.engine.max_source_len, min(64, max_model_len // 2)
    num_prompt = min(num_prompt, config.engine.max_num_batched_tokens)
    speed: dict[str, Any] = {"num_prompt_tokens": num_prompt, "num_new_tokens": num_new}
    vocab_size = config.model.source_vocab_size or config.model.vocab_size
    for name, length, count in (("warm-up", min(16, num_prompt), 2), ("speed", num_prompt, num_new)):
        engine.submit(name, generator.integers(0, vocab_size, length).tolist(), max(1, count))
        metrics = engine.receive().metrics
    speed["prefill_tokens_per_s"] = _per_second(num_prompt, metrics.get("prefill_s"))
    speed["decode_tokens_per_s"] = _per_second(num_new - 1, metrics.get("decode_s"))
    return speed


def _per_second(num_tokens: int, seconds: float | None) -> float | None:
    return round(num_tokens / seconds, 1) if seconds else None
