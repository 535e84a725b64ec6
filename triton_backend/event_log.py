"""What happened in an engine, step by step, in enough detail to do it again.

One JSON line per event: a request came in, a request was taken out, a step was planned. The scheduler knows no clock,
so the same arrivals at the same steps give the same plans; ``replay`` checks that they do, which turns a report of odd
behaviour into a test. The log holds prompts: it is for debugging, and off unless asked for.

    {"step": 0, "event": "submitted", "request": {…}, "prompt_ids": […], "source_ids": […], "seed": …}
    {"step": 0, "event": "planned", "decodes": [], "prefills": [[0, 0, 17]], "saves": [], "starts": [0], "copies": 0}
    {"step": 9, "event": "aborted", "request": 0, "reason": "CANCELLED: …"}
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, TextIO

import structlog

from triton_backend.grammar_params import GrammarSpec
from triton_backend.protocol import GenerateRequest
from triton_backend.sampling_params import SamplingParams
from triton_backend.scheduler import StepPlan
from triton_backend.sequence import RequestState

log = structlog.get_logger()


class EventLog:
    """Writes events to ``stream``, or nowhere; owned by the engine thread. Requests are named by their arrival."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream
        self._step = 0

    def submitted(self, state: RequestState) -> None:
        if self._stream is not None:
            request = _request_json(state.request)
            ids = {"prompt_ids": state.lead.prompt_ids, "source_ids": state.source_ids}
            self._write("submitted", request=request, seed=state.seed, **ids)

    def aborted(self, state: RequestState, reason: str) -> None:
        self._write("aborted", request=state.arrival, reason=reason)

    def planned(self, plan: StepPlan) -> None:
        if self._stream is not None:
            self._write("planned", **plan_json(plan))
        self._step += 1

    def _write(self, event: str, **fields: Any) -> None:
        if self._stream is None:
            return
        try:
            print(json.dumps({"step": self._step, "event": event, **fields}), file=self._stream, flush=True)
        except OSError as error:  # a full disk must not stop the engine
            log.warning("event_log_ended", step=self._step, reason=str(error))
            self._stream = None


def plan_json(plan: StepPlan) -> dict[str, Any]:
    return {
        "decodes": [[sequence.state.arrival, sequence.index, sequence.row] for sequence in plan.decodes],
        "prefills": [[chunk.state.arrival, chunk.start, chunk.length] for chunk in plan.prefills],
        "saves": [[save.sequence.state.arrival, save.row] for save in plan.saves],
        "starts": [start.state.arrival for start in plan.starts],
        "copies": len(plan.copies),
    }


def read_events(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def request_from(event: dict[str, Any]) -> GenerateRequest:
    """The request of a ``submitted`` event, with the prompt as token ids and the seed that was drawn."""
    fields = dict(event["request"])
    params = {name: _frozen(value) for name, value in fields.pop("params").items()}
    if params.get("grammar"):
        params["grammar"] = GrammarSpec(**params["grammar"])
    params["seed"] = event["seed"]
    input_ids = tuple(event["source_ids"] or event["prompt_ids"])
    return GenerateRequest(**{**fields, "params": SamplingParams(**params), "text": None, "input_ids": input_ids})


def _request_json(request: GenerateRequest) -> dict[str, Any]:
    return dataclasses.asdict(dataclasses.replace(request, text=None, input_ids=()))


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
