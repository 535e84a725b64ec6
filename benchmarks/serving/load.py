"""The load generator: ``python -m benchmarks.serving.load TASK`` with TASK as JSON, its result as JSON.

    {"url": "127.0.0.1:8001", "model": "bench", "workloads": [{…Workload…}]}      → {"runs": [[{…Answer…}]]}

Every client is a coroutine; every request has a gRPC stream of its own, as tritonclient's asyncio client opens it.
While the clock runs, responses are only kept with the time of their arrival; they are read afterwards.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio

from benchmarks.engines.closed_loop import Answer
from benchmarks.serving.workload import Workload

EVERYTHING = ("return_finish_reason", "return_num_input_tokens", "return_num_output_tokens", "return_token_ids")


@dataclass(frozen=True)
class Call:
    """One request. ``flags`` are boolean inputs that are on; ``cancel_after`` responses the client leaves."""

    input_ids: tuple[int, ...]
    sampling: Mapping[str, Any]
    stream: bool = True
    flags: tuple[str, ...] = ("return_token_ids",)
    cancel_after: int = 0


@dataclass
class Reply:
    """Responses as they arrived, or the text of the error that ended the request."""

    sent_s: float = 0.0
    times_s: list[float] = field(default_factory=list)
    responses: list[triton.InferResult] = field(default_factory=list)
    error: str = ""

    @property
    def token_ids(self) -> list[int]:
        """Of a request with one sequence."""
        return [int(i) for response in self.responses for i in response.as_numpy("output_ids")]

    @property
    def answer(self) -> Answer:
        """Of a stream with one sequence: several tokens of one response were known at the same time."""
        counts = [len(response.as_numpy("output_ids")) for response in self.responses]
        times_s = [time_s for time_s, count in zip(self.times_s, counts, strict=True) for _ in range(count)]
        return Answer(self.sent_s, self.token_ids, times_s)


def greedy(prompt: Iterable[int], num_new: int) -> Call:
    return Call(tuple(prompt), {"temperature": 0, "max_tokens": num_new, "ignore_eos": True})


async def ask(client: triton_aio.InferenceServerClient, model: str, call: Call, reply: Reply | None = None) -> Reply:
    """Send one request and keep its responses; an error of the engine is part of the reply.

    A caller that gives ``reply`` can watch it grow.
    """
    request = {"model_name": model, "inputs": _inputs(call)}

    async def requests() -> AsyncIterator[dict[str, Any]]:
        yield request

    reply = reply or Reply()
    reply.sent_s = time.perf_counter()
    stream = client.stream_infer(requests())
    async for result, error in stream:
        if error is not None:
            reply.error = str(error)
            break
        reply.times_s.append(time.perf_counter())
        reply.responses.append(result)
        if len(reply.times_s) == call.cancel_after:
            break
    stream.cancel()
    return reply


async def ask_all(
    url: str, model: str, calls: Iterable[Call], num_clients: int, on_reply: Callable[[int], None] = lambda count: None
) -> list[Reply]:
    """The replies to ``calls``, in their order; each of n clients sends its next one when its last is answered.

    ``on_reply`` is told how many have been answered.
    """
    waiting = iter(enumerate(calls))
    replies: dict[int, Reply] = {}

    async with triton_aio.InferenceServerClient(url) as client:

        async def work() -> None:
            for index, call in waiting:  # shared by all clients
                replies[index] = await ask(client, model, call)
                on_reply(len(replies))

        await asyncio.gather(*(work() for _ in range(num_clients)))
    return [replies[index] for index in sorted(replies)]


def run(url: str, model: str, workload: Workload) -> list[Answer]:
    """Answer a workload; raises RuntimeError with the engine's words if it refuses."""
    calls = [greedy(prompt, workload.num_new) for prompt in workload.prompts]
    replies = asyncio.run(ask_all(url, model, calls, workload.num_clients))
    for reply in replies:
        if reply.error:
            raise RuntimeError(reply.error)
    return [reply.answer for reply in replies]


def _inputs(call: Call) -> list[triton.InferInput]:
    return [
        _tensor("input_ids", "INT32", np.array(call.input_ids, dtype=np.int32)),
        _tensor("sampling_parameters", "BYTES", np.array([json.dumps(dict(call.sampling))], dtype=np.object_)),
        _tensor("stream", "BOOL", np.array([call.stream])),
        *(_tensor(name, "BOOL", np.array([True])) for name in call.flags),
    ]


def _tensor(name: str, data_type: str, values: np.ndarray) -> triton.InferInput:
    tensor = triton.InferInput(name, list(values.shape), data_type)
    tensor.set_data_from_numpy(values)
    return tensor


def main(task: dict[str, Any]) -> dict[str, Any]:
    runs = []
    for workload in (Workload(**values) for values in task["workloads"]):
        run(task["url"], task["model"], workload.warm_up)
        runs.append([dataclasses.asdict(answer) for answer in run(task["url"], task["model"], workload)])
    return {"runs": runs}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
