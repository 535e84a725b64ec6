"""What is served, changed under load: import, promote, canary, roll back, failures and kills, with no request lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest

from benchmarks.moves import Streams
from control_plane.client import ControlPlane
from control_plane.registry import model_processes
from control_plane.registry.routing import TTL_S as TABLE_TTL_S
from control_plane.triton import GenerateCall, connect
from tests.e2e.conftest import Stack, wait_for

pytestmark = pytest.mark.e2e
MODEL = "chat"
NUM_STREAMS = 16


@pytest.fixture(scope="module")
def llmos(stack: Stack) -> Iterator[ControlPlane]:
    with ControlPlane(stack.web_url, stack.api_key) as llmos:
        yield llmos


@pytest.fixture(scope="module")
def chat(stack: Stack, llmos: ControlPlane) -> Iterator[str]:
    """An imported checkpoint, published by the command line as versions 1 (fp32) and 2 (int8); 1 is production."""
    imported = stack.llmos("import", str(stack.checkpoint), "imported")
    assert imported.returncode == 0, imported.stderr
    for precision in ("fp32", "int8"):
        published = stack.llmos("publish", "imported", MODEL, "--precision", precision)
        assert published.returncode == 0, published.stderr
    assert llmos.version(MODEL, 1)["serving"]["state"] == "Standby"
    promoted = stack.llmos("promote", MODEL, "1")
    assert promoted.returncode == 0, promoted.stderr
    yield MODEL
    assert stack.llmos("withdraw", MODEL).returncode == 0
    wait_for(lambda: stack.stub_pid(MODEL, 1) is None, 30, "end of the model")


def load(stack: Stack, num_clients: int = NUM_STREAMS) -> Streams:
    return Streams(stack.web_url, stack.api_key, MODEL, num_clients)


def state_of(llmos: ControlPlane, number: int) -> str:
    found: str = llmos.version(MODEL, number)["serving"]["state"]
    return found


def wait_loaded(llmos: ControlPlane, number: int) -> None:
    wait_for(lambda: state_of(llmos, number) == "Loaded", 60, f"version {number} loaded")


def production(llmos: ControlPlane) -> int:
    (number,) = (alias["version"] for alias in llmos.model(MODEL)["aliases"] if alias["name"] == "production")
    return int(number)


def put_on_standby(llmos: ControlPlane, number: int) -> None:
    """See that no process has the version: as a canary that is ended, it is not kept warm."""
    llmos.wait_deployment(MODEL, llmos.deploy(MODEL, "canary", number, weight=0)["id"])
    llmos.deploy(MODEL, "abort")
    wait_for(lambda: state_of(llmos, number) == "Standby", 30, f"version {number} on standby")


def test_every_step_under_load_loses_no_request(stack: Stack, chat: str, llmos: ControlPlane) -> None:
    with load(stack) as streams:
        canary = stack.llmos("canary", chat, "2", "--weight", "20")
        assert canary.returncode == 0, canary.stderr
        assert "version 2 gets 20 % of the requests" in canary.stdout
        began_at = len(streams.answers)
        wait_for(lambda: len(streams.answers) - began_at > 200, 60, "200 answers beside a canary")
        assert {version for _, version in streams.answers[began_at:]} == {1, 2}
        for command in (("promote", chat, "2"), ("rollback", chat), ("promote", chat, "2"), ("rollback", chat)):
            wait_loaded(llmos, 2)
            moved = stack.llmos(*command)
            assert moved.returncode == 0, moved.stderr
            moved_at, before = time.monotonic(), 2 if command[0] == "rollback" else 1
            time.sleep(1)
            assert streams.last_start(before) < moved_at + TABLE_TTL_S, "no request goes to the version before"
    assert streams.errors == []
    shown = stack.llmos("models", "show", chat).stdout
    for expected in ("production", "Loaded", "tokens compared", "rollback", "canary 20 %", "UpToDate"):
        assert expected in shown


def test_a_canarys_share_is_met_within_3_points(stack: Stack, chat: str, llmos: ControlPlane) -> None:
    llmos.wait_deployment(chat, llmos.deploy(chat, "canary", 2, weight=20)["id"])
    time.sleep(2 * TABLE_TTL_S)
    body = {"model": chat, "prompt": "The", "max_tokens": 1}
    headers = {"Authorization": f"Bearer {stack.api_key}"}

    def version_of(body: dict[str, object]) -> str:
        return client.post("/v1/completions", json=body).headers["X-Model-Version"]

    with (
        httpx.Client(base_url=stack.web_url, headers=headers, timeout=60, trust_env=False) as client,
        ThreadPoolExecutor(8) as pool,
    ):
        versions = Counter(pool.map(version_of, [body] * 1000))
        of_one_user = set(pool.map(version_of, [{**body, "user": "ann"}] * 20))
    assert abs(versions["2"] - 200) <= 30, versions
    assert len(of_one_user) == 1
    llmos.deploy(chat, "abort")


def test_unversioned_requests_on_triton_follow_production(stack: Stack, chat: str, llmos: ControlPlane) -> None:
    digests = {number: llmos.version(chat, number)["digest"] for number in (1, 2)}
    triton = connect(stack.settings)
    try:
        assert triton.probe(chat).digest == digests[1]
        for kind, number in (("promote", 2), ("rollback", 1)):
            llmos.deploy(chat, kind, number)
            wait_for(lambda number=number: triton.probe(chat).digest == digests[number], 60, f"version {number}")
    finally:
        triton.close()


def test_a_version_loaded_anew_while_the_old_process_drains_goes_on_answering(stack: Stack, chat: str) -> None:
    """What is new in a model directory makes Triton load all of it again beside what runs."""
    triton = connect(stack.settings)
    adapter = stack.settings.model_repository / chat / "adapters" / "empty"
    sampling = {"max_tokens": 24, "temperature": 0, "ignore_eos": True}
    calls = [GenerateCall(chat, 1, text="The import", sampling=sampling, stream=True) for _ in range(16)]
    try:
        adapter.mkdir()
        pid = stack.stub_pid(chat, 1)
        triton.load(chat)
        wait_for(lambda: stack.stub_pid(chat, 1) not in (None, pid), 10, "a new process")
        for _ in range(20):
            finished = [response.finished for _, response in triton.generate_many(calls, 10)]
            assert sum(finished) == len(calls)
    finally:
        triton.close()
        adapter.rmdir()


def test_a_version_that_cannot_be_loaded_is_blocked_with_its_reason_and_the_old_one_serves(
    stack: Stack, chat: str, llmos: ControlPlane
) -> None:
    """Its artifact was damaged in the store after it had been registered."""
    put_on_standby(llmos, 2)
    digest = llmos.version(chat, 2)["digest"]
    for model in (chat, f"{chat}.canary"):
        shutil.rmtree(stack.settings.model_repository / model / "2", ignore_errors=True)
    graph = stack.home / "artifacts" / digest / "model.onnx"
    content = graph.read_bytes()
    graph.write_bytes(content[:-1])
    try:
        with load(stack, 4) as streams:
            refused = stack.llmos("promote", chat, "2")
    finally:
        graph.write_bytes(content)
    assert refused.returncode == 1
    assert "BlockedByFailedLoad" in refused.stderr and digest in refused.stderr and "model.onnx" in refused.stderr
    assert streams.errors == [] and production(llmos) == 1
    assert llmos.deployments(chat)[0]["state"] == "BlockedByFailedLoad"
    assert stack.llmos("status").returncode == 0


@pytest.mark.parametrize("victim", ["server", "process"])
def test_triton_killed_while_it_loads_a_version_serves_it_afterwards(
    stack: Stack, chat: str, llmos: ControlPlane, victim: str
) -> None:
    put_on_standby(llmos, 2)
    deployment = llmos.deploy(chat, "promote", 2)

    def loading() -> list[psutil.Process]:
        return list(model_processes.stub_processes(stack.settings, f"{chat}.canary", 2))

    wait_for(loading, 10, "a process that loads")
    server = stack.triton_pid()
    assert server is not None
    for pid in [server] if victim == "server" else [process.pid for process in loading()]:
        os.kill(pid, signal.SIGKILL)
    found = llmos.wait_deployment(chat, deployment["id"], 180)
    if found["state"] == "BlockedByFailedLoad":
        # A process that dies while it loads is a failed load, if Triton says so; the next try is a person's.
        assert victim == "process" and found["failure"]["message"]
        found = llmos.wait_deployment(chat, llmos.deploy(chat, "promote", 2)["id"], 60)
    assert found["state"] == "UpToDate"
    wait_loaded(llmos, 1)
    llmos.wait_deployment(chat, llmos.deploy(chat, "rollback", 1)["id"], 60)
    assert production(llmos) == 1


def test_triton_killed_between_load_and_move_serves_it_afterwards(stack: Stack, chat: str, llmos: ControlPlane) -> None:
    wait_loaded(llmos, 2)
    server = stack.triton_pid()
    assert server is not None
    os.kill(server, signal.SIGKILL)
    deployment = llmos.deploy(chat, "promote", 2)
    assert llmos.wait_deployment(chat, deployment["id"], 60)["state"] == "UpToDate"
    wait_for(lambda: stack.triton_pid() not in (None, server), 30, "a new server")
    time.sleep(2)
    for number in (1, 2):
        wait_loaded(llmos, number)
    llmos.wait_deployment(chat, llmos.deploy(chat, "rollback", 1)["id"], 60)


def test_a_version_folder_deleted_by_hand_is_put_back(stack: Stack, chat: str, llmos: ControlPlane) -> None:
    folder = stack.settings.model_repository / chat / "1"
    wait_loaded(llmos, 1)
    with load(stack, 4) as streams:
        shutil.rmtree(folder)
        wait_for(lambda: (folder / "manifest.json").is_file(), 30, "the folder")
        wait_loaded(llmos, 1)
    assert streams.errors == []


def test_forcing_needs_a_reason_that_stays_in_the_history(stack: Stack, chat: str, llmos: ControlPlane) -> None:
    llmos.edit_model(chat, thresholds={"perplexity.bits_per_byte": {"max": 0.1}})
    try:
        refused = stack.llmos("promote", chat, "2")
        assert refused.returncode == 1 and "was not measured" in refused.stderr
        forced = stack.llmos("promote", chat, "2", "--force", "--reason", "measured by hand", "--json")
        assert forced.returncode == 0, forced.stderr
        assert json.loads(forced.stdout)["overridden"]
        assert llmos.deployments(chat)[0]["reason"] == "measured by hand"
    finally:
        llmos.edit_model(chat, thresholds={})
        stack.llmos("rollback", chat)
