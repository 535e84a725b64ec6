"""The reconciler's loop against a Triton that needs no server."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from sqlalchemy.exc import OperationalError

from control_plane import create_app
from control_plane.artifacts import artifact_store
from control_plane.errors import ControlPlaneError, RequestTimeout, ServingError
from control_plane.extensions import db
from control_plane.registry import deployments, model_processes, services, serving_state
from control_plane.registry.desired import ModelIntent
from control_plane.registry.model_directory import ensure_installed, is_sealed
from control_plane.registry.places import Place
from control_plane.registry.reconciler import Reconciler
from control_plane.registry.serving_state import FAILED_TO_LOAD, LOADED, ServingState
from control_plane.registry.tables import Deployment
from control_plane.settings import Settings
from control_plane.triton_fake import FakeTriton, word_by_word
from tests.unit.control_plane.test_signatures import make_key
from triton_backend.version_folder import digest, seal

pytestmark = pytest.mark.unit


class RecordingTriton(FakeTriton):
    """Loads what config.pbtxt says and remembers what it was told; ``load_error`` makes loads of a version fail."""

    def __init__(self, repository: Path) -> None:
        super().__init__({})
        self.repository = repository
        self.orders: list[str] = []
        self.load_errors: dict[int, ControlPlaneError] = {}

    def load(self, name: str, timeout_s: float = 1.0) -> None:
        config = (self.repository / name / "config.pbtxt").read_text()
        versions = [int(number) for number in re.findall(r"versions: (\d+)", config)]
        self.orders.append(f"load {name} {versions}")
        for version in versions:
            if version in self.load_errors:
                raise self.load_errors[version]
            if not is_sealed(self.repository / name / str(version)):
                raise ServingError(f"INTERNAL: a file of version {version} differs")
        super().load(name)
        self.versions[name] = versions
        self.digests |= {(name, v): digest(self.repository / name / str(v)) for v in versions}
        self.probe_error = None

    def unload(self, name: str, timeout_s: float = 1.0) -> None:
        self.orders.append(f"unload {name}")
        super().unload(name)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings.from_environment(
        {
            "LLMOS_HOME": str(tmp_path / "home"),
            "LLMOS_MODEL_REPOSITORY": str(tmp_path / "models"),
            "LLMOS_PROBE_INTERVAL_S": "0.05",
            "LLMOS_REDIS_URL": "redis://127.0.0.1:1/0",
        }
    )


@pytest.fixture
def triton(settings: Settings) -> Iterator[RecordingTriton]:
    triton = RecordingTriton(settings.model_repository)
    yield triton
    triton.close()


@pytest.fixture
def app(settings: Settings, triton: RecordingTriton) -> Flask:
    app = create_app(settings, triton)
    with app.app_context():
        db.create_all()
    return app


@pytest.fixture
def publish(app: Flask, tmp_path: Path) -> Callable[..., None]:
    """Store and register the next version of a model; the first one is production."""

    def publish(name: str = "chat", certificate: dict[str, Any] | None = None) -> None:
        folder = tmp_path / "exported" / f"{name}{len(list(tmp_path.glob('exported/*')))}"
        folder.mkdir(parents=True)
        (folder / "model.onnx").write_text(folder.name)
        proof = {"summary": {"passed": True}, **(certificate or {})}
        (folder / "certificate.json").write_text(json.dumps(proof))
        seal(folder, source={}, environment={})
        with app.app_context():
            artifact_store(app.config["SETTINGS"]).put(folder)
            deployments.adopt_production(name, services.register(name, folder).number)

    return publish


@pytest.fixture
def deploy(app: Flask, settings: Settings) -> Callable[..., int]:
    def deploy(kind: str, number: int | None = None, weight: float | None = None) -> int:
        with app.app_context():
            serving = serving_state.read(settings)
            return deployments.deploy(
                "chat", kind, lambda: serving, number=number, weight=weight, warm=timedelta(hours=1)
            ).id

    return deploy


@pytest.fixture
def state_of(app: Flask) -> Callable[[int], Deployment]:
    def state_of(deployment_id: int) -> Deployment:
        with app.app_context():
            return deployments.get_deployment("chat", deployment_id)

    return state_of


Look = Callable[[Callable[[ServingState], object]], ServingState]


@pytest.fixture
def tick_until(app: Flask, settings: Settings, publish: Callable[..., None]) -> Look:
    publish()
    reconciler = Reconciler(app)

    def run(is_reached: Callable[[ServingState], object]) -> ServingState:
        deadline = time.monotonic() + 20
        while True:
            reconciler.tick()
            state = serving_state.read(settings)
            if is_reached(state):
                return state
            assert time.monotonic() < deadline, state
            time.sleep(0.01)

    return run


def is_loaded(*places: tuple[str, int]) -> Callable[[ServingState], bool]:
    """Exactly these places are wanted, and all of them are loaded."""

    def reached(state: ServingState) -> bool:
        found = {tuple(place): known.state for place, known in state.places.items()}
        return found == dict.fromkeys(places, LOADED)

    return reached


CHAT_1, CHAT_2, CANARY_2 = ("chat", 1), ("chat", 2), ("chat.canary", 2)


def test_production_is_fetched_loaded_and_said_to_be(tick_until: Look, triton: RecordingTriton) -> None:
    state = tick_until(is_loaded(CHAT_1))
    assert (state.models["chat"].version, state.models["chat"].state) == (1, LOADED)
    assert triton.orders == ["load chat [1]"]


def test_promoted_version_is_loaded_beside_tested_and_moved_without_a_gap(
    tick_until: Look, triton: RecordingTriton, publish, deploy, state_of
) -> None:
    tick_until(is_loaded(CHAT_1))
    publish()
    number = deploy("promote", 2)
    tick_until(is_loaded(CHAT_1, CHAT_2))
    assert state_of(number).state == "UpToDate"
    tick_until(lambda _: "chat.canary" not in triton.models)
    assert triton.orders == ["load chat [1]", "load chat.canary [2]", "load chat [1, 2]", "unload chat.canary"]


def test_version_that_was_rolled_back_from_leaves_the_model_and_stays_warm_beside_it(
    tick_until: Look, triton: RecordingTriton, publish, deploy
) -> None:
    publish()
    deploy("promote", 2)
    tick_until(is_loaded(CHAT_1, CHAT_2))
    deploy("rollback")
    tick_until(lambda state: is_loaded(CHAT_1, CANARY_2)(state) and triton.versions["chat"] == [1])
    assert deploy("promote", 2) and triton.versions["chat.canary"] == [2]


def test_version_that_fails_to_load_blocks_its_deployment_and_leaves_everything_else(
    tick_until: Look, triton: RecordingTriton, publish, deploy, state_of
) -> None:
    tick_until(is_loaded(CHAT_1))
    publish()
    triton.load_errors[2] = ServingError("INTERNAL: out of memory\n\nAt:\n  /srv/model.py(31): initialize\n")
    number = deploy("promote", 2)
    tick_until(lambda _: state_of(number).state != "InProgress")
    blocked = state_of(number)
    assert (blocked.state, blocked.failure_reason) == ("BlockedByFailedLoad", "ModelLoadFailed")
    assert blocked.failure_message == "INTERNAL: out of memory"
    tick_until(is_loaded(CHAT_1))
    assert triton.orders == ["load chat [1]", "load chat.canary [2]", "unload chat.canary"]


def test_version_that_does_not_give_its_proven_answers_is_not_served(
    tick_until: Look, triton: RecordingTriton, publish, deploy, state_of
) -> None:
    right = {"prompt_ids": [5, 6, 7], "token_ids": [0, 1, 2]}
    publish(certificate={"tokens": [right, {"prompt_ids": [5], "token_ids": [9, 9]}]})
    publish(certificate={"tokens": [{"prompt_ids": [5], "token_ids": [9, 9]}]})
    good, bad = deploy("promote", 2), None
    tick_until(lambda _: state_of(good).state == "UpToDate")
    bad = deploy("promote", 3)
    tick_until(lambda _: state_of(bad).state != "InProgress")
    message = state_of(bad).failure_message
    assert message is not None
    assert "smoke test" in message and "[0, 1]; expected [9, 9]" in message


def test_what_another_reconciler_only_loaded_is_tested_before_it_counts(
    tick_until: Look, triton: RecordingTriton, publish, deploy, state_of, settings: Settings, app: Flask
) -> None:
    publish(certificate={"tokens": [{"prompt_ids": [5], "token_ids": [9, 9]}]})
    with app.app_context():
        wanted = services.get_version("chat", 2).digest
    ensure_installed(settings.model_repository, artifact_store(settings), Place("chat.canary", 2), wanted)
    triton.models["chat.canary"], triton.versions["chat.canary"] = word_by_word, [2]
    triton.digests[("chat.canary", 2)] = wanted
    found = deploy("canary", 2, 10.0)
    tick_until(lambda _: state_of(found).state != "InProgress")
    assert (state_of(found).state, "smoke test" in (state_of(found).failure_message or "")) == (
        "BlockedByFailedLoad",
        True,
    )


def test_a_clock_that_is_set_meanwhile_moves_what_is_told(app: Flask, settings: Settings, publish, monkeypatch) -> None:
    publish()
    reconciler = Reconciler(app)
    reconciler.tick()
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 3600.0)
    deadline = time.monotonic() + 20
    while serving_state.read(settings).places[Place(*CHAT_1)].state != LOADED:
        assert time.monotonic() < deadline
        reconciler.tick()
    assert serving_state.read(settings).places[Place(*CHAT_1)].since > real() + 3000.0


def test_version_that_no_trusted_key_signed_blocks_its_deployment_and_is_not_installed(
    app: Flask, settings: Settings, triton: RecordingTriton, publish, deploy, state_of, tmp_path: Path, request
) -> None:
    key = make_key(tmp_path / "private", "ours", tmp_path / "trusted")
    signing = {"signing_key": key, "trusted_keys": tmp_path / "trusted"}
    app.config["SETTINGS"] = replace(settings, **signing)
    tick_until = request.getfixturevalue("tick_until")
    tick_until(is_loaded(CHAT_1))
    for signing_key, said in (
        (None, "is not signed"),
        (make_key(tmp_path / "private", "theirs"), "none of them made for it"),
    ):
        app.config["SETTINGS"] = replace(settings, signing_key=signing_key)
        publish()
        with app.app_context():
            number = services.find_versions("chat", None, 1)[0].number
        deployment = deploy("promote", number)
        tick_until(lambda _, deployment=deployment: state_of(deployment).state != "InProgress")
        blocked = state_of(deployment)
        assert (blocked.state, blocked.failure_reason) == ("BlockedByFailedLoad", "ModelLoadFailed")
        assert said in blocked.failure_message
        assert not list(settings.model_repository.glob(f"*/{number}"))
    tick_until(is_loaded(CHAT_1))
    assert [order for order in triton.orders if order.startswith("load")] == ["load chat [1]"]


def test_damaged_folder_is_replaced_from_the_store(tick_until: Look, triton: RecordingTriton) -> None:
    tick_until(is_loaded(CHAT_1))
    folder = triton.repository / "chat" / "1"
    (folder / "model.onnx").write_text("damaged")
    triton.models.clear()
    tick_until(lambda state: is_sealed(folder) and is_loaded(CHAT_1)(state) and triton.models)
    assert set(triton.orders) == {"load chat [1]"}


def test_deleted_folder_of_a_loaded_version_is_put_back(tick_until: Look, triton: RecordingTriton) -> None:
    tick_until(is_loaded(CHAT_1))
    shutil.rmtree(triton.repository / "chat" / "1")
    tick_until(lambda _: is_sealed(triton.repository / "chat" / "1"))
    tick_until(is_loaded(CHAT_1))


def test_engine_that_serves_other_files_is_reloaded(tick_until: Look, triton: RecordingTriton, monkeypatch) -> None:
    monkeypatch.setattr(model_processes, "kill_server", lambda _: triton.models.clear())
    tick_until(is_loaded(CHAT_1))
    triton.digests[CHAT_1] = "somebody else's"
    tick_until(lambda _: triton.orders.count("load chat [1]") == 2)
    tick_until(is_loaded(CHAT_1))


def test_what_was_wanted_is_wanted_still_while_the_database_is_away(
    tick_until: Look, triton: RecordingTriton, monkeypatch
) -> None:
    tick_until(is_loaded(CHAT_1))

    def away() -> None:
        raise OperationalError("SELECT", {}, Exception("database is locked"))

    monkeypatch.setattr(deployments, "intents", away)
    triton.models.clear()
    tick_until(lambda _: triton.orders == ["load chat [1]"] * 2)
    tick_until(is_loaded(CHAT_1))


def test_new_reconciler_leaves_everything_until_it_has_read_what_is_wanted(
    tick_until: Look, triton: RecordingTriton, app: Flask, monkeypatch
) -> None:
    tick_until(is_loaded(CHAT_1))
    read, num_failing = deployments.intents, 5

    def away() -> list[ModelIntent]:
        nonlocal num_failing
        num_failing -= 1
        if num_failing >= 0:
            raise OperationalError("SELECT", {}, Exception("connection refused"))
        return read()

    monkeypatch.setattr(deployments, "intents", away)
    successor, orders = Reconciler(app), list(triton.orders)
    for _ in range(10):
        successor.tick()
        time.sleep(0.02)
    assert num_failing < 0 and triton.orders == orders


def test_new_reconciler_unloads_what_its_predecessor_left_over(
    tick_until: Look, triton: RecordingTriton, publish, settings: Settings, app: Flask
) -> None:
    publish()
    store = artifact_store(settings)
    with app.app_context():
        wanted = services.get_version("chat", 2).digest
    ensure_installed(settings.model_repository, store, Place("chat.canary", 2), wanted)
    triton.models["chat.canary"] = triton.models["resnet"] = word_by_word
    triton.versions["chat.canary"] = [2]
    tick_until(lambda _: "unload chat.canary" in triton.orders)
    tick_until(is_loaded(CHAT_1))
    assert "resnet" in triton.models, "somebody else's model"


@pytest.mark.parametrize("error", [ServingError("Stub process 'chat_0_0' is not healthy."), RequestTimeout("too late")])
def test_model_that_answers_no_probe_is_reloaded_beside_others_and_else_with_all_of_triton(
    tick_until: Look, triton: RecordingTriton, publish, monkeypatch: pytest.MonkeyPatch, error: ControlPlaneError
) -> None:
    def kill_server(_: Settings) -> bool:
        triton.orders.append("kill server")
        triton.models.clear()
        triton.probe_error = None
        return True

    monkeypatch.setattr(model_processes, "kill_server", kill_server)
    tick_until(is_loaded(CHAT_1))
    triton.probe_error = error
    state = tick_until(lambda state: is_loaded(CHAT_1)(state) and state.models["chat"].num_failures == 1)
    assert triton.orders == ["load chat [1]", "kill server", "load chat [1]"]
    assert state.models["chat"].message is None

    publish("other")
    tick_until(is_loaded(CHAT_1, ("other", 1)))
    triton.orders.clear()
    triton.probe_error = error
    tick_until(lambda _: {"unload chat", "load chat [1]"} <= set(triton.orders))
    assert "kill server" not in triton.orders


def test_refused_load_is_told_without_its_traceback_and_tried_again_later(
    tick_until: Look, triton: RecordingTriton
) -> None:
    triton.load_errors[1] = ServingError("INTERNAL: no such operator\n\nAt:\n  /srv/model.py(31): initialize\n")
    state = tick_until(lambda state: "chat" in state.models and state.models["chat"].state == FAILED_TO_LOAD)
    assert (state.models["chat"].reason, state.models["chat"].message) == (
        "ModelLoadFailed",
        "INTERNAL: no such operator",
    )
    assert triton.orders == ["load chat [1]", "unload chat"]


def test_triton_that_is_away_is_waited_for(tick_until: Look, triton: RecordingTriton) -> None:
    triton.is_running = False
    state = tick_until(lambda state: "chat" in state.models and state.models["chat"].state == "Pending")
    assert not state.triton_is_reachable
    triton.is_running = True
    tick_until(is_loaded(CHAT_1))


def test_version_that_serves_already_is_not_loaded_again(
    tick_until: Look, triton: RecordingTriton, app: Flask, settings: Settings
) -> None:
    with app.app_context():
        wanted = services.get_version("chat", 1).digest
    ensure_installed(settings.model_repository, artifact_store(settings), Place("chat", 1), wanted)
    triton.models["chat"], triton.digests[CHAT_1] = word_by_word, wanted
    tick_until(is_loaded(CHAT_1))
    assert triton.orders == []
