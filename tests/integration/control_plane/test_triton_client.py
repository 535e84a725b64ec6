"""The client's rules for streams, over real gRPC with a scripted server: silence, probes, cancellation, loss.

The same client against the real Triton is tested in tests/e2e; here each rule can be met at will and in a second.
"""

from __future__ import annotations

import json
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from control_plane import triton as triton_module
from control_plane.errors import BadRequest, ClientGone, NotFound, RequestTimeout, ServingError, TritonUnavailable
from control_plane.triton import GenerateCall, TritonClient

from .processes import free_port, wait_for

pytestmark = pytest.mark.integration


class ScriptedServer(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Answers the first word at once and the second when ``release`` is set; probes say ``engine_uptime_s``."""

    def __init__(self) -> None:
        self.engine_uptime_s = 3600.0
        self.probe_error = ""
        self.probe_delay_s = 0.0
        self.num_probes = 0
        self.index_state = "READY"
        self.release = threading.Event()
        self.begun = threading.Event()
        self.cancelled = threading.Event()
        self.ends_early = False
        self.errs_last = False

    def ModelStreamInfer(self, requests, context):
        request = next(requests)
        if any(tensor.name == "health_probe" for tensor in request.inputs):
            yield self._probe_answer()
            return
        if request.model_name != "m":
            if self.errs_last:
                self.begun.wait(5)
            yield service_pb2.ModelStreamInferResponse(
                error_message=f"Request for unknown model: '{request.model_name}' is not found"
            )
            return
        context.add_callback(lambda: self.release.is_set() or self.cancelled.set())
        self.begun.set()
        yield _message("one ", final=False)
        if self.ends_early:
            return
        while not self.release.wait(0.02):
            if not context.is_active():
                return
        yield _message("two", final=True)

    def _probe_answer(self):
        self.num_probes += 1
        time.sleep(self.probe_delay_s)
        if self.probe_error:
            return service_pb2.ModelStreamInferResponse(error_message=self.probe_error)
        return _message("x", final=True, metrics={"engine_uptime_s": self.engine_uptime_s, "digest": "d"})

    def RepositoryIndex(self, request, context):
        reply = service_pb2.RepositoryIndexResponse()
        reply.models.add(name="m", version="1", state=self.index_state)
        return reply


def _message(text: str, final: bool, metrics: dict | None = None) -> service_pb2.ModelStreamInferResponse:
    message = service_pb2.ModelStreamInferResponse()
    message.infer_response.parameters["triton_final_response"].bool_param = final
    tensors = {"text_output": text}
    if metrics:
        tensors["request_metrics"] = json.dumps(metrics)
    for name, value in tensors.items():
        message.infer_response.outputs.add(name=name, datatype="BYTES", shape=[1])
        message.infer_response.raw_output_contents.append(struct.pack("<I", len(value)) + value.encode())
    return message


@pytest.fixture
def server() -> ScriptedServer:
    return ScriptedServer()


@pytest.fixture
def client(server: ScriptedServer, monkeypatch) -> Iterator[TritonClient]:
    monkeypatch.setattr(triton_module, "SILENCE_S", 0.3)
    monkeypatch.setattr(triton_module, "WATCH_INTERVAL_S", 0.1)
    address = f"127.0.0.1:{free_port()}"
    grpc_server = grpc.server(ThreadPoolExecutor(16))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(server, grpc_server)
    grpc_server.add_insecure_port(address)
    grpc_server.start()
    client = TritonClient(address, probe_timeout_s=1.0)
    client.stop_server = lambda: grpc_server.stop(None)  # type: ignore[attr-defined]
    yield client
    client.close()
    server.release.set()
    grpc_server.stop(None).wait()


CALL = GenerateCall("m", text="x", stream=True)


def texts(responses) -> list[str]:
    return [response.outputs[0].text for response in responses]


def test_silent_stream_of_a_living_engine_goes_on(client, server):
    threading.Timer(1.0, server.release.set).start()
    assert texts(client.generate_stream(CALL, 10)) == ["one ", "two"]
    assert server.num_probes >= 1


@pytest.mark.parametrize(
    "break_it",
    [
        lambda server: setattr(server, "probe_error", "Stub process 'm_0_0' is not healthy."),
        lambda server: setattr(server, "probe_error", "Request for unknown model: 'm' is not found"),
        lambda server: setattr(server, "engine_uptime_s", 0.1),
        lambda server: setattr(server, "probe_delay_s", 3.0),
    ],
    ids=["not healthy", "unknown model", "younger engine", "no answer"],
)
def test_silent_stream_of_a_lost_engine_fails(client, server, break_it):
    stream = client.generate_stream(CALL, 30)
    assert next(stream).outputs[0].text == "one "
    time.sleep(0.2)
    break_it(server)
    started_at = time.monotonic()
    with pytest.raises(ServingError, match="lost this request"):
        next(stream)
    assert time.monotonic() - started_at < 3


def test_engine_that_refuses_the_probe_itself_is_alive(client, server):
    server.probe_error = "UNAVAILABLE: 256 requests wait"
    threading.Timer(1.0, server.release.set).start()
    assert texts(client.generate_stream(CALL, 10)) == ["one ", "two"]


def test_stream_of_an_old_version_that_finishes_its_requests_goes_on(client, server):
    server.engine_uptime_s, server.index_state = 0.1, "UNLOADING"
    threading.Timer(1.0, server.release.set).start()
    assert texts(client.generate_stream(CALL, 10)) == ["one ", "two"]


def test_silent_streams_share_their_probes(client, server):
    threading.Timer(1.05, server.release.set).start()
    assert len(list(client.generate_many([CALL] * 8, 10))) == 16
    assert server.num_probes <= 10


def test_closed_stream_is_cancelled_at_the_server(client, server):
    stream = client.generate_stream(CALL, 10)
    next(stream)
    stream.close()
    wait_for(server.cancelled.is_set, 5, "the cancellation")


def test_abandoned_request_is_cancelled_at_the_server(client, server):
    left = threading.Event()
    responses = client.generate_many([CALL], 10, is_abandoned=left.is_set)
    next(responses)
    left.set()
    with pytest.raises(ClientGone):
        next(responses)
    wait_for(server.cancelled.is_set, 5, "the cancellation")


def test_first_error_cancels_the_other_calls(client, server):
    server.errs_last = True  # a call that has not reached the server yet cannot be seen to be cancelled there
    with pytest.raises(NotFound):
        list(client.generate_many([CALL, GenerateCall("nope", text="x")], 10))
    wait_for(server.cancelled.is_set, 5, "the cancellation")


def test_request_ends_at_its_time_limit(client):
    with pytest.raises(RequestTimeout):
        list(client.generate_stream(CALL, 0.5))


def test_stream_that_ends_without_a_final_response_is_an_error(client, server):
    server.ends_early = True
    with pytest.raises(ServingError, match="without a final response"):
        list(client.generate_stream(CALL, 10))


def test_server_that_goes_away_ends_its_streams_at_once(client):
    stream = client.generate_stream(CALL, 10)
    next(stream)
    client.stop_server()
    with pytest.raises((TritonUnavailable, ServingError)):
        next(stream)


def test_text_with_half_a_character_is_refused_before_it_is_sent(client):
    with pytest.raises(BadRequest):
        list(client.generate_stream(GenerateCall("m", text="\ud83d"), 10))


def test_client_without_a_server_says_where_it_looked():
    client = TritonClient(f"127.0.0.1:{free_port()}")
    assert not client.is_live()
    with pytest.raises(TritonUnavailable, match=r"Triton at 127\.0\.0\.1:\d+ does not answer"):
        client.repository_index()
    client.close()


def test_close_ends_the_background_thread(client):
    client.repository_index()
    client.close()
    wait_for(lambda: "triton-client" not in [t.name for t in threading.enumerate()], 2, "the end of the thread")
