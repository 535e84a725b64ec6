"""What breaks is mended without a person, or refused with its name."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator

import httpx
import psutil
import pytest

from control_plane import create_app
from control_plane.artifacts import artifact_store
from control_plane.errors import ControlPlaneError, NotFound
from control_plane.registry import deployments, model_processes, services, serving_state
from control_plane.registry.serving_state import FAILED_TO_LOAD
from control_plane.triton import GenerateCall, TritonClient, connect
from tests.e2e.conftest import Stack, wait_for
from triton_backend.version_folder import MANIFEST_JSON, seal

pytestmark = pytest.mark.e2e
HEAL_S = 15.0


@pytest.fixture
def triton(stack: Stack) -> Iterator[TritonClient]:
    stack.wait_loaded()
    client = connect(stack.settings)
    yield client
    client.close()


def answers(triton: TritonClient, model: str) -> bool:
    try:
        return bool(triton.generate(GenerateCall(model, text="The", sampling={"max_tokens": 2}), 5.0).outputs)
    except ControlPlaneError:
        return False


def served_copy(stack: Stack, name: str) -> str:
    """Serve the starter's version once more under another name, and as another artifact; returns its digest."""
    folder = stack.home / name
    shutil.copytree(stack.settings.versions_dir / stack.model / "1", folder)
    (folder / MANIFEST_JSON).unlink()
    digest = seal(folder, {"checkpoint": name}, {})
    with create_app(stack.settings).app_context():
        artifact_store(stack.settings).put(folder)
        deployments.adopt_production(name, services.register(name, folder).number)
    return digest


def is_gone(pid: int) -> bool:
    """Whether the process has ended; Triton collects its dead children late."""
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_killed_model_process_is_replaced_within_15_s(stack: Stack, triton: TritonClient) -> None:
    pid = stack.stub_pid()
    assert pid is not None and answers(triton, stack.model)
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: is_gone(pid), 5, "end of the process")
    assert wait_for(lambda: answers(triton, stack.model), HEAL_S, "an answer") < HEAL_S
    assert stack.stub_pid() != pid
    stack.wait_loaded()


def test_streams_of_a_killed_model_process_end_with_an_error_on_triton_itself(stack: Stack) -> None:
    stack.wait_loaded()
    parameters = json.dumps({"max_tokens": 400, "ignore_eos": True, "n": 24})
    body = {"text_input": "The", "stream": True, "sampling_parameters": parameters}
    url = f"{stack.http_url}/v2/models/{stack.model}/generate_stream"
    pid = stack.stub_pid()
    assert pid is not None
    with pytest.raises(httpx.TransportError), httpx.stream("POST", url, json=body, timeout=HEAL_S) as response:
        for number, _ in enumerate(response.iter_lines()):
            if number == 0:
                os.kill(pid, signal.SIGKILL)
                killed_at = time.monotonic()
    assert time.monotonic() - killed_at < HEAL_S
    wait_for(lambda: stack.stub_pid() not in (None, pid), HEAL_S, "a new process")
    stack.wait_loaded()


def test_stopped_model_process_is_replaced_and_does_not_stay(stack: Stack, triton: TritonClient) -> None:
    pid = stack.stub_pid()
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    wait_for(lambda: is_gone(pid), 40, "end of the stopped process")
    wait_for(lambda: answers(triton, stack.model), HEAL_S, "an answer")
    stack.wait_loaded()


def test_killed_triton_comes_back_with_its_models_and_leaves_no_orphans(stack: Stack, triton: TritonClient) -> None:
    old_server, old_stub = stack.triton_pid(), stack.stub_pid()
    assert old_server is not None and old_stub is not None
    os.kill(old_server, signal.SIGKILL)
    wait_for(lambda: stack.triton_pid() not in (None, old_server), HEAL_S, "a new server")
    wait_for(lambda: answers(triton, stack.model), HEAL_S, "an answer")
    assert model_processes.orphan_stubs(stack.settings) == []
    assert is_gone(old_stub)
    stack.wait_loaded()


def test_changed_weights_are_refused_by_name_and_other_models_go_on(stack: Stack, triton: TritonClient) -> None:
    digest = served_copy(stack, "damaged")
    copies = [
        folder / "model.onnx.data"
        for folder in (stack.settings.model_repository / "damaged" / "1", stack.home / "artifacts" / digest)
    ]
    content = copies[1].read_bytes()
    changed = bytearray(content)
    changed[len(content) // 2] ^= 1
    try:
        stack.wait_loaded("damaged")
        for weights in copies:
            weights.write_bytes(changed)
        # What is loaded goes on; the change is met when the model is loaded again, and again in the store.
        pid = stack.stub_pid("damaged")
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: stack.model_state("damaged") == FAILED_TO_LOAD, 30, "refusal of the damaged model")
        state = serving_state.read(stack.settings).models["damaged"]
        assert state.reason == "ModelLoadFailed"
        assert state.message is not None and "model.onnx.data" in state.message and "Traceback" not in state.message
        assert answers(triton, stack.model)
        assert stack.llmos("status").returncode == 1
        copies[1].write_bytes(content)
        stack.wait_loaded("damaged")
        assert answers(triton, "damaged")
    finally:
        stack.llmos("withdraw", "damaged")
        wait_for(lambda: stack.model_state("damaged") is None, 15, "end of the removed model")
    assert stack.llmos("status").returncode == 0


def test_unknown_model_is_not_found(stack: Stack, triton: TritonClient) -> None:
    with pytest.raises(NotFound, match="nosuch"):
        triton.generate(GenerateCall("nosuch", text="x"), 5.0)
