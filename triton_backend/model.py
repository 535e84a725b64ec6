"""Triton's entry point; the only file that imports ``triton_python_backend_utils``.

It translates and delegates: tensors to a ``GenerateRequest``, a ``GenerateResponse`` to tensors. ``execute`` hands
over and returns at once. Responses are sent by one responder thread, in order, and the last one carries Triton's
FINAL flag: exactly once per request, after which neither its sender nor its request is touched (Triton crashes
otherwise).
"""

from __future__ import annotations

import dataclasses
import json
import queue
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import structlog
import triton_python_backend_utils as pb_utils

from triton_backend.errors import EngineError, QueueFull, RequestCancelled
from triton_backend.loading import configure_logging, load_engine
from triton_backend.metrics import METRICS, MetricSpec
from triton_backend.protocol import INPUTS, OUTPUTS, GenerateRequest, GenerateResponse, parse_request, response_tensors
from triton_backend.sequence import ResponseSink

log = structlog.get_logger()

NUM_SLOW_INTAKES = 2
MAX_SLOW_INTAKES = 64
"""So many wait for them at most, themselves included."""

_NUMPY_TYPES = {"TYPE_STRING": np.object_, "TYPE_INT32": np.int32, "TYPE_UINT32": np.uint32, "TYPE_FP32": np.float32}
_OUTPUT_TYPES = {spec.name: _NUMPY_TYPES[spec.data_type] for spec in OUTPUTS}


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        configure_logging()
        folder = Path(args["model_repository"]) / args["model_version"]
        self._metrics = TritonMetrics(json.loads(args["model_config"])["name"], args["model_version"])
        self._engine, self._config = load_engine(folder, self._metrics)
        self._responder = Responder()
        # Others need not wait while a long text is tokenized or a hard grammar compiled.
        self._slow_intake = ThreadPoolExecutor(NUM_SLOW_INTAKES, "intake")
        self._slow_places = threading.Semaphore(MAX_SLOW_INTAKES)

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            sink = TritonSink(request, self._responder)
            with _errors_to(sink, request.request_id()):
                parsed = sink.request = self._parse(request)
                if self._engine.is_quick(parsed):
                    self._engine.submit(parsed, sink)
                elif self._slow_places.acquire(blocking=False):
                    self._slow_intake.submit(self._submit, parsed, sink, time.monotonic())
                else:
                    raise QueueFull(f"{MAX_SLOW_INTAKES} long texts and new grammars are being read; try again later")

    def finalize(self) -> None:
        self._slow_intake.shutdown()
        self._engine.stop()
        self._responder.stop()

    def _submit(self, request: GenerateRequest, sink: TritonSink, arrived_s: float) -> None:
        try:
            with _errors_to(sink, request.request_id):
                if sink.is_cancelled():
                    raise RequestCancelled("the client cancelled the request")
                self._engine.submit(request, sink, arrived_s)
        finally:
            self._slow_places.release()

    def _parse(self, request: Any) -> GenerateRequest:
        tensors = {}
        for spec in INPUTS:
            tensor = pb_utils.get_input_tensor_by_name(request, spec.name)
            if tensor is not None:
                tensors[spec.name] = tensor.as_numpy().reshape(-1).tolist()
        parameters = json.loads(request.parameters() or "{}")
        model = self._config.model
        parsed = parse_request(request.request_id(), tensors, parameters, model.generation_defaults)
        if model.kind == "encoder_decoder":  # a source text is not the beginning of its answer
            parsed = dataclasses.replace(parsed, exclude_input_in_output=True)
        return parsed


@contextmanager
def _errors_to(sink: ResponseSink, request_id: str) -> Iterator[None]:
    """A request that cannot be taken is answered with the reason, always."""
    try:
        yield
    except EngineError as error:
        sink.send(GenerateResponse(request_id, finished=True, error=str(error)))
    except Exception:
        log.exception("request_failed")
        message = str(EngineError("the request could not be read; see the log of the Triton server"))
        sink.send(GenerateResponse(request_id, finished=True, error=message))


class TritonSink(ResponseSink):
    """The way back to one client; ``send`` is called by the engine or, for a refused request, by ``execute``."""

    def __init__(self, triton_request: Any, responder: Responder) -> None:
        self._sender = triton_request.get_response_sender()
        self._responder = responder
        self.request: GenerateRequest | None = None
        # Each is written by one thread.
        self._num_put = self._num_delivered = 0

    def send(self, response: GenerateResponse) -> None:
        self._num_put += 1
        self._responder.put(self, response)

    def is_behind(self) -> bool:
        return self._num_put > self._num_delivered

    def is_cancelled(self) -> bool:
        return self._sender.is_cancelled()

    def deliver(self, response: GenerateResponse) -> None:
        """Hand a response to Triton; on the responder thread."""
        try:
            self._deliver(response)
        finally:
            self._num_delivered += 1

    def _deliver(self, response: GenerateResponse) -> None:
        flags = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if response.finished else 0
        if response.error is not None:
            # Our codes are Triton's names: INVALID_ARG, UNAVAILABLE, CANCELLED, INTERNAL.
            code = getattr(pb_utils.TritonError, response.error.partition(":")[0])
            self._sender.send(pb_utils.InferenceResponse(error=pb_utils.TritonError(response.error, code)), flags=flags)
            return
        try:
            built = self._built(response)
        except Exception:
            if not response.finished:
                raise
            # Without a last response the client would wait for ever, and Triton keep the request.
            log.exception("response_not_built", request_id=response.request_id)
            built = pb_utils.InferenceResponse(error=pb_utils.TritonError("INTERNAL: the answer could not be sent"))
        self._sender.send(built, flags=flags)

    def _built(self, response: GenerateResponse) -> Any:
        assert self.request is not None
        tensors = [
            pb_utils.Tensor(name, np.array(values, dtype=_OUTPUT_TYPES[name]))
            for name, values in response_tensors(self.request, response).items()
        ]
        return pb_utils.InferenceResponse(tensors)


class Responder:
    """One thread that sends all responses, so that the engine never waits for Triton."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[TritonSink, GenerateResponse] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="responder", daemon=True)
        self._thread.start()

    def put(self, sink: TritonSink, response: GenerateResponse) -> None:
        self._queue.put((sink, response))

    def stop(self) -> None:
        """Send what is queued, then end the thread."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            sink, response = item
            try:
                sink.deliver(response)
            except Exception:  # a client that is gone must not end the thread that serves the others
                log.exception("response_not_sent", request_id=response.request_id)


class TritonMetrics:
    """Publishes engine metrics on Triton's Prometheus endpoint.

    Nothing is ever deleted: the process that replaces this one while it drains has the same series, and deleting them
    under it makes Triton write into freed memory. A counter simply goes on when its version is loaded again.
    """

    def __init__(self, model: str, version: str) -> None:
        self._families: dict[str, Any] = {}
        self._series: dict[str, Any] = {}
        for spec in METRICS:
            if spec.name not in self._families:
                self._families[spec.name] = pb_utils.MetricFamily(
                    name=spec.name,
                    description=spec.description,
                    kind=getattr(pb_utils.MetricFamily, spec.kind.upper()),
                )
            options = {"buckets": list(spec.buckets)} if spec.kind == "histogram" else {}
            labels = {"model": model, "version": version, **spec.labels}
            self._series[spec.key] = self._families[spec.name].Metric(labels=labels, **options)

    def record(self, spec: MetricSpec, value: float) -> None:
        series = self._series[spec.key]
        if spec.kind == "counter":
            series.increment(value)
        elif spec.kind == "gauge":
            series.set(value)
        else:
            series.observe(value)
