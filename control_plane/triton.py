"""The only door to Triton: health, repository control, probes and generation, over one gRPC channel.

``TritonClient`` may be used from any thread. It owns one background thread with an event loop; every call runs there
and
hands its result to the waiting caller, so a stream costs a queue and no thread. Each request has a gRPC stream of its
own. It knows nothing of HTTP, OpenAI or SQL; ``triton_wire`` knows the messages.

Triton never ends the streams of a model process that was killed. The watch task therefore probes the model of every
stream that has been silent for ``SILENCE_S`` (at most one probe a second per model):

    opened ── chunk ── silent ≥ 2 s ──► probe ─┬─ answered, and the engine is older than the stream: keep waiting
                                               └─ failed, timed out, or the engine is younger: ServingError
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Coroutine, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from control_plane.errors import (
    BadRequest,
    ClientGone,
    ControlPlaneError,
    Overloaded,
    ServingError,
    TritonUnavailable,
)
from control_plane.secrets import triton_admin_key
from control_plane.settings import Settings
from control_plane.triton_wire import (
    GenerateCall,
    IndexEntry,
    ProbeResult,
    error_from_rpc,
    error_from_text,
    generate_response,
    infer_request,
)
from triton_backend.protocol import GenerateResponse

__all__ = ["GenerateCall", "GenerateResponse", "IndexEntry", "ProbeResult", "TritonClient", "connect"]

SILENCE_S = 2.0
WATCH_INTERVAL_S = 1.0
ABANDONED_CHECK_S = 0.5
CONTROL_TIMEOUT_S = 10.0
LOAD_TIMEOUT_S = 600.0
ADMIN_KEY_HEADER = "triton-grpc-protocol-admin-key"
# gRPC's own back-off grows to two minutes; a restarted Triton should be found within a second. The http_proxy variable
# must never redirect a loopback address.
CHANNEL_OPTIONS = (
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.max_receive_message_length", -1),
    ("grpc.enable_http_proxy", 0),
)

T = TypeVar("T")
Engine = tuple[str, int | None]
"""Whom a request is for: a model of Triton and a version, or its highest loaded one."""
Event = tuple[int, "GenerateResponse | ControlPlaneError"]


class TritonClient:
    """Client of one Triton server; ``close`` it when done. ``admin_key`` opens the restricted control protocols."""

    def __init__(self, url: str, admin_key: str | None = None, probe_timeout_s: float = 10.0) -> None:
        self._url = url
        self._metadata = ((ADMIN_KEY_HEADER, admin_key),) if admin_key else ()
        self._probe_timeout_s = probe_timeout_s
        self._start_lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        # The rest is touched by the loop thread only.
        self._stub: Any = None
        self._channel: Any = None
        self._streams: set[_Stream] = set()
        self._checks: dict[Engine, asyncio.Task[None]] = {}
        self._watcher: asyncio.Task[None] | None = None

    def is_live(self) -> bool:
        try:
            return bool(self._call("ServerLive", service_pb2.ServerLiveRequest(), timeout_s=2.0).live)
        except ControlPlaneError:
            return False

    def wait_live(self, timeout_s: float) -> None:
        """Return when Triton answers; raises TritonUnavailable after ``timeout_s``."""
        deadline = time.monotonic() + timeout_s
        while not self.is_live():
            if time.monotonic() > deadline:
                raise TritonUnavailable(f"Triton at {self._url} did not answer within {timeout_s:g} s")
            time.sleep(0.1)

    def server_version(self) -> str:
        return str(self._call("ServerMetadata", service_pb2.ServerMetadataRequest(), timeout_s=2.0).version)

    def repository_index(self) -> list[IndexEntry]:
        """Every model directory that Triton knows, one entry per version that was ever loaded."""
        return self._run(self._repository_index())

    def load(self, name: str, timeout_s: float = LOAD_TIMEOUT_S) -> None:
        """Load or reload; returns when the model is ready, raises ServingError with Triton's reason."""
        self._call("RepositoryModelLoad", service_pb2.RepositoryModelLoadRequest(model_name=name), timeout_s)

    def unload(self, name: str, timeout_s: float = CONTROL_TIMEOUT_S) -> None:
        """Stop accepting requests for a model; running ones finish. An unknown name is no error."""
        self._call("RepositoryModelUnload", service_pb2.RepositoryModelUnloadRequest(model_name=name), timeout_s)

    def probe(self, model: str, version: int | None = None, timeout_s: float | None = None) -> ProbeResult:
        """Have the engine compute one token, ahead of its queue; without a ``version`` that of the highest loaded one.

        Raises ServingError, ModelNotReady, NotFound, RequestTimeout or TritonUnavailable.
        """
        return self._run(self._probe((model, version), timeout_s or self._probe_timeout_s))

    def generate(self, call: GenerateCall, timeout_s: float) -> GenerateResponse:
        """The whole answer at once; ``call.stream`` must be false."""
        responses = [response for response in self.generate_stream(call, timeout_s) if response.outputs]
        if len(responses) != 1:
            raise ServingError(f"model {call.model!r} sent {len(responses)} responses to one request; expected 1")
        return responses[0]

    def generate_stream(self, call: GenerateCall, timeout_s: float) -> Generator[GenerateResponse, None, None]:
        """Yield responses as they come; closing the iterator cancels the request in the engine."""
        with closing(self.generate_many([call], timeout_s)) as responses:
            for _, response in responses:
                yield response

    def generate_many(
        self, calls: Sequence[GenerateCall], timeout_s: float, is_abandoned: Callable[[], bool] | None = None
    ) -> Generator[tuple[int, GenerateResponse], None, None]:
        """Run ``calls`` side by side and yield (position of the call, response) as they come.

        The first error of any call is raised and cancels the others; so does closing the iterator. ``is_abandoned`` is
        asked at every response, and twice a second while none comes; if it says yes, ClientGone is raised.
        """
        inbox: queue.SimpleQueue[Event] = queue.SimpleQueue()
        loop = self._started_loop()
        streams = [_Stream((call.model, call.version), position, inbox) for position, call in enumerate(calls)]
        try:
            for stream, call in zip(streams, calls, strict=True):
                loop.call_soon_threadsafe(self._open, stream, infer_request(call), timeout_s)
            yield from _drain(inbox, len(streams), is_abandoned)
        finally:
            loop.call_soon_threadsafe(_cancel, streams)

    def close(self) -> None:
        """Cancel what runs and stop the background thread."""
        with self._start_lock:
            loop, self._loop = self._loop, None
        if loop is not None:
            asyncio.run_coroutine_threadsafe(self._disconnect(), loop).result()
            loop.call_soon_threadsafe(loop.stop)

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._started_loop()).result()

    def _call(self, rpc: str, request: Any, timeout_s: float) -> Any:
        return self._run(self._unary(rpc, request, timeout_s))

    def _started_loop(self) -> asyncio.AbstractEventLoop:
        # Started on first use, so that a client made before a fork works in the child.
        with self._start_lock:
            if self._loop is None:
                loop = asyncio.new_event_loop()
                threading.Thread(target=_run_loop, args=(loop,), name="triton-client", daemon=True).start()
                asyncio.run_coroutine_threadsafe(self._connect(), loop).result()
                self._loop = loop
            return self._loop

    # From here on: the loop thread.

    async def _connect(self) -> None:
        self._channel = grpc.aio.insecure_channel(self._url, options=CHANNEL_OPTIONS)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._watcher = asyncio.create_task(self._watch())

    async def _disconnect(self) -> None:
        tasks = [stream.task for stream in self._streams if stream.task] + list(self._checks.values())
        tasks += [self._watcher] if self._watcher else []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._channel.close()

    async def _unary(self, rpc: str, request: Any, timeout_s: float) -> Any:
        try:
            return await getattr(self._stub, rpc)(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise error_from_rpc(error, self._url) from None

    async def _repository_index(self) -> list[IndexEntry]:
        reply = await self._unary("RepositoryIndex", service_pb2.RepositoryIndexRequest(), CONTROL_TIMEOUT_S)
        return [IndexEntry(entry.name, entry.version, entry.state, entry.reason) for entry in reply.models]

    async def _probe(self, engine: Engine, timeout_s: float) -> ProbeResult:
        call = GenerateCall(*engine, input_ids=(0,), sampling={"max_tokens": 1}, health_probe=True)
        sent_at = time.monotonic()
        metrics: dict[str, Any] = {}
        async for response in self._responses(infer_request(call), timeout_s):
            metrics.update(response.metrics)
        return ProbeResult(
            latency_s=time.monotonic() - sent_at,
            engine_uptime_s=float(metrics.get("engine_uptime_s", 0.0)),
            digest=str(metrics.get("digest", "")),
        )

    async def _responses(self, request: Any, timeout_s: float) -> Any:
        """Send one request on a stream of its own and yield typed responses until Triton ends the stream."""
        rpc = self._stub.ModelStreamInfer(iter((request,)), timeout=timeout_s, metadata=self._metadata)
        is_finished = False
        try:
            async for message in rpc:
                if message.error_message:
                    raise error_from_text(message.error_message)
                response = generate_response(message.infer_response)
                is_finished = response.finished
                yield response
            if not is_finished:
                raise ServingError(f"Triton ended the stream of model {request.model_name!r} without a final response")
        except grpc.RpcError as error:
            raise error_from_rpc(error, self._url) from None
        finally:
            rpc.cancel()

    def _open(self, stream: _Stream, request: Any, timeout_s: float) -> None:
        if not stream.is_closed:
            self._streams.add(stream)
            stream.task = asyncio.create_task(self._pump(stream, request, timeout_s))

    async def _pump(self, stream: _Stream, request: Any, timeout_s: float) -> None:
        try:
            async for response in self._responses(request, timeout_s):
                stream.deliver(response)
        except ControlPlaneError as error:
            stream.deliver(error)
        except Exception as error:
            # Whatever it was, the thread that waits for this stream must hear of it.
            stream.deliver(ServingError(f"reading the answer of model {stream.engine[0]!r} failed: {error!r}"))
        finally:
            self._streams.discard(stream)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_INTERVAL_S)
            now = time.monotonic()
            for engine in {stream.engine for stream in self._streams if now - stream.last_seen >= SILENCE_S}:
                if engine not in self._checks:
                    self._checks[engine] = asyncio.create_task(self._check(engine))
                    self._checks[engine].add_done_callback(partial(self._forget_check, engine))

    def _forget_check(self, engine: Engine, _: asyncio.Task[None]) -> None:
        self._checks.pop(engine, None)

    async def _check(self, engine: Engine) -> None:
        """Probe an engine and fail its silent streams that can get no answer any more."""
        sent_at = time.monotonic()
        silent = [s for s in self._streams if s.engine == engine and sent_at - s.last_seen >= SILENCE_S]
        try:
            engine_started_at = sent_at - (await self._probe(engine, self._probe_timeout_s)).engine_uptime_s
            lost = [stream for stream in silent if stream.opened_at < engine_started_at]
            reason = "its process was replaced while the answer was being made"
        except (BadRequest, Overloaded):
            return  # The engine itself said no, so it lives.
        except ControlPlaneError as error:
            lost, reason = silent, f"its health probe failed: {error}"
        lost = [stream for stream in lost if stream.last_seen < sent_at and not stream.is_closed]
        if lost and not await self._is_draining(engine):
            for stream in lost:
                stream.fail(ServingError(f"model {engine[0]!r} lost this request: {reason}; send it again"))

    async def _is_draining(self, engine: Engine) -> bool:
        """Whether a version is finishing its requests before it is unloaded: it takes no probes any more."""
        model, version = engine
        try:
            index = await self._repository_index()
        except ControlPlaneError:
            return False
        states = [e.state for e in index if e.name == model and version in (None, e.version_number)]
        return "UNLOADING" in states


@dataclass(eq=False)
class _Stream:
    """One request on its way. Owned by the loop thread; ``inbox`` belongs to the thread that reads the answer."""

    engine: Engine
    position: int
    inbox: queue.SimpleQueue[Event]
    opened_at: float = field(default_factory=time.monotonic)
    last_seen: float = field(default_factory=time.monotonic)
    task: asyncio.Task[None] | None = None
    is_closed: bool = False
    is_finished: bool = False

    def deliver(self, item: GenerateResponse | ControlPlaneError) -> None:
        self.last_seen = time.monotonic()
        self.is_finished = isinstance(item, GenerateResponse) and item.finished
        self.inbox.put((self.position, item))

    def fail(self, error: ControlPlaneError) -> None:
        self.deliver(error)
        _cancel([self])


def _cancel(streams: Sequence[_Stream]) -> None:
    for stream in streams:
        stream.is_closed = True
        # After the final response Triton is about to end the stream by itself.
        if stream.task is not None and not stream.is_finished:
            stream.task.cancel()


def _drain(
    inbox: queue.SimpleQueue[Event], num_streams: int, is_abandoned: Callable[[], bool] | None
) -> Generator[tuple[int, GenerateResponse], None, None]:
    """Yield what arrives until every stream is finished; raises the first error."""
    while num_streams:
        try:
            position, item = inbox.get(timeout=ABANDONED_CHECK_S)
        except queue.Empty:
            position, item = 0, None
        if is_abandoned is not None and is_abandoned():
            raise ClientGone("the client hung up before its answer was complete")
        if item is None:
            continue
        if isinstance(item, ControlPlaneError):
            raise item
        num_streams -= item.finished
        yield position, item


def _run_loop(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    loop.run_forever()
    loop.close()


def connect(settings: Settings) -> TritonClient:
    """The client of this installation's Triton."""
    return TritonClient(settings.triton_grpc_url, triton_admin_key(settings), settings.probe_timeout_s)
