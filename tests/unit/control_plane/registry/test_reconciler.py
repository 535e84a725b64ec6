"""The reconciler's loop against a Triton that needs no server."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from control_plane.errors import ControlPlaneError, RequestTimeout, ServingError
from control_plane.registry import model_processes, serving_state
from control_plane.registry.model_directory import install
from control_plane.registry.reconciler import Reconciler
from control_plane.registry.serving_state import FAILED_TO_LOAD, LOADED, ModelState
from control_plane.settings import Settings
from control_plane.triton_fake import FakeTriton, word_by_word
from triton_backend.version_folder import seal

pytestmark = pytest.mark.unit


class RecordingTriton(FakeTriton):
    """Remembers what it was told; ``load_error`` makes loads fail."""

    def __init__(self) -> None:
        super().__init__({})
        self.orders: list[str] = []
        self.load_error: ControlPlaneError | None = None

    def load(self, name: str, timeout_s: float = 1.0) -> None:
        self.orders.append(f"load {name}")
        if self.load_error is not None:
            raise self.load_error
        super().load(name)
        self.probe_error = None

    def unload(self, name: str, timeout_s: float = 1.0) -> None:
        self.orders.append(f"unload {name}")
        super().unload(name)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    settings = Settings.from_environment(
        {
            "LLMOS_HOME": str(tmp_path / "home"),
            "LLMOS_MODEL_REPOSITORY": str(tmp_path / "models"),
            "LLMOS_PROBE_INTERVAL_S": "0.05",
        }
    )
    folder = tmp_path / "version"
    folder.mkdir()
    (folder / "model.onnx").touch()
    seal(folder, source={}, environment={})
    install(folder, settings.model_repository, "chat", 1)
    return settings


@pytest.fixture
def triton() -> Iterator[RecordingTriton]:
    triton = RecordingTriton()
    yield triton
    triton.close()


@pytest.fixture
def tick_until(settings: Settings, triton: RecordingTriton) -> Callable[[Callable[[ModelState], bool]], ModelState]:
    reconciler = Reconciler(settings, triton)

    def run(is_reached: Callable[[ModelState], bool]) -> ModelState:
        deadline = time.monotonic() + 20
        while True:
            reconciler.tick()
            state = serving_state.read(settings).models.get("chat")
            if state is not None and is_reached(state):
                return state
            assert time.monotonic() < deadline, state
            time.sleep(0.01)

    return run


def test_installed_model_is_loaded_and_said_to_be(tick_until, triton: RecordingTriton) -> None:
    assert tick_until(lambda state: state.state == LOADED).version == 1
    assert triton.orders == ["load chat"]


@pytest.mark.parametrize("error", [ServingError("Stub process 'chat_0_0' is not healthy."), RequestTimeout("too late")])
def test_model_that_answers_no_probe_is_reloaded_beside_others_and_else_with_all_of_triton(
    tick_until, triton: RecordingTriton, settings: Settings, monkeypatch: pytest.MonkeyPatch, error: ControlPlaneError
) -> None:
    def kill_server(_: Settings) -> None:
        triton.orders.append("kill server")
        triton.models.clear()
        triton.probe_error = None

    monkeypatch.setattr(model_processes, "kill_server", kill_server)
    tick_until(lambda state: state.state == LOADED)
    triton.probe_error = error
    state = tick_until(lambda state: state.state == LOADED and state.num_failures == 1)
    assert triton.orders == ["load chat", "kill server", "load chat"]
    assert state.message is None

    install(settings.home.parent / "version", settings.model_repository, "other", 1)
    tick_until(lambda _: "load other" in triton.orders)
    triton.orders.clear()
    triton.probe_error = error
    tick_until(lambda _: {"unload chat", "load chat"} <= set(triton.orders))
    assert "kill server" not in triton.orders


def test_refused_load_is_told_without_its_traceback_and_tried_again_later(tick_until, triton: RecordingTriton) -> None:
    triton.load_error = ServingError("INTERNAL: model.onnx.data differs\n\nAt:\n  /srv/model.py(31): initialize\n")
    state = tick_until(lambda state: state.state == FAILED_TO_LOAD)
    assert (state.reason, state.message) == ("ModelLoadFailed", "INTERNAL: model.onnx.data differs")
    assert triton.orders == ["load chat"]


def test_triton_that_is_away_is_waited_for(tick_until, triton: RecordingTriton, settings: Settings) -> None:
    triton.is_running = False
    tick_until(lambda state: state.state == "Pending")
    assert not serving_state.read(settings).triton_is_reachable
    triton.is_running = True
    tick_until(lambda state: state.state == LOADED)


def test_model_that_serves_already_is_not_loaded_again(tick_until, triton: RecordingTriton) -> None:
    triton.models["chat"] = word_by_word
    tick_until(lambda state: state.state == LOADED)
    assert triton.orders == []
