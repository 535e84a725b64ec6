"""The engine without Triton: ``python -m triton_backend FOLDER`` reads JSON-lines requests and writes JSON-lines
responses.

For proofs, benchmarks and debugging. All requests are read and run concurrently; the process ends when standard input
has ended and every answer is written.

    in   {"id": "7", "text": "…" | "input_ids": […], "stream": false, "sampling_parameters": {…}}
    out  {"id": "7", "outputs": [{"index": 0, "text": "…", "token_ids": […], "finish_reason": "stop"}],
          "num_input_tokens": 3, "finished": true, "metrics": {…}}   or   {"id": "7", "error": "CODE: message"}
          with the parameter prompt_logprobs also "prompt_logprobs": [null, -1.25, …], one per token of the prompt
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import threading
from pathlib import Path
from typing import Any

from triton_backend.errors import EngineError, InvalidRequest
from triton_backend.event_log import EventLog
from triton_backend.loading import configure_logging, load_engine
from triton_backend.parameter_kinds import is_token_id, require_encodable, shown
from triton_backend.protocol import GenerateRequest, GenerateResponse
from triton_backend.replay import replay
from triton_backend.sampling_params import SamplingParams
from triton_backend.sequence import ResponseSink


class LineWriter(ResponseSink):
    """Writes responses to standard output and keeps the number of open requests within the engine's queue."""

    def __init__(self, max_open: int) -> None:
        self._changed = threading.Condition()
        self._num_open = 0
        self._max_open = max_open

    def open(self) -> None:
        """Count one more request, once there is room for it."""
        with self._changed:
            self._changed.wait_for(lambda: self._num_open < self._max_open)
            self._num_open += 1

    def send(self, response: GenerateResponse) -> None:
        document: dict[str, Any] = {"id": response.request_id}
        if response.error is not None:
            document["error"] = response.error
        else:
            document["outputs"] = [dataclasses.asdict(output) for output in response.outputs]
            document["num_input_tokens"] = response.num_input_tokens
            document["finished"] = response.finished
            document["metrics"] = dict(response.metrics)
            if response.prompt_logprobs is not None:
                document["prompt_logprobs"] = [token and token[0].logprob for token in response.prompt_logprobs]
        with self._changed:
            print(json.dumps(document), flush=True)
            if response.finished:
                self._num_open -= 1
                self._changed.notify_all()

    def is_cancelled(self) -> bool:
        return False

    def wait(self) -> None:
        """Return when every opened request has had its last response."""
        with self._changed:
            self._changed.wait_for(lambda: self._num_open == 0)


def parse_line(line: str, defaults: dict[str, Any]) -> GenerateRequest:
    """Raises InvalidRequest."""
    try:
        document = json.loads(line)
        text, input_ids = document.get("text"), document.get("input_ids", ())
        if text is not None and not isinstance(text, str):
            raise InvalidRequest(f"text has value {shown(text)}; expected a string")
        require_encodable("text", text or "")
        if not isinstance(input_ids, (list, tuple)) or not all(map(is_token_id, input_ids)):
            raise InvalidRequest(f"input_ids has value {shown(input_ids)}; expected a list of token ids")
        return GenerateRequest(
            request_id=str(document["id"]),
            params=SamplingParams.from_mapping(document.get("sampling_parameters", {}), defaults),
            text=text,
            input_ids=tuple(input_ids),
            stream=bool(document.get("stream", False)),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidRequest(f"the line is not a valid request ({error!r}); expected JSON with id and text") from error


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m triton_backend", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="version folder")
    parser.add_argument("--unsealed", action="store_true", help="the folder has no manifest yet; do not verify it")
    parser.add_argument("--event-log", type=Path, help="write what happens to this file, prompts included")
    parser.add_argument("--replay", type=Path, help="do again what an event log says, and compare the plans")
    arguments = parser.parse_args()
    configure_logging()
    if arguments.replay:
        return _replay(arguments.folder, arguments.replay, is_sealed=not arguments.unsealed)
    events = EventLog(arguments.event_log.open("w", encoding="utf-8")) if arguments.event_log else None
    try:
        engine, config = load_engine(arguments.folder, is_sealed=not arguments.unsealed, events=events)
    except EngineError as error:
        print(error, file=sys.stderr)
        return 1
    writer = LineWriter(config.engine.max_queue_size)
    for line in sys.stdin:
        writer.open()
        try:
            request = parse_line(line, dict(config.model.generation_defaults))
            engine.submit(request, writer)
        except EngineError as error:
            writer.send(GenerateResponse(_line_id(line), finished=True, error=str(error)))
    writer.wait()
    engine.stop()
    return 0


def _replay(folder: Path, path: Path, is_sealed: bool) -> int:
    try:
        engine, _ = load_engine(folder, is_sealed=is_sealed, is_started=False)
        num_steps, difference = replay(engine, path)
    except (EngineError, OSError, ValueError, KeyError) as error:
        print(f"cannot replay {path}: {error!s}", file=sys.stderr)
        return 1
    print(difference or f"{num_steps} steps, each as it was")
    return 1 if difference else 0


def _line_id(line: str) -> str:
    try:
        return str(json.loads(line)["id"])
    except (ValueError, KeyError, TypeError):
        return ""


if __name__ == "__main__":
    sys.exit(main())
