"""The starter model is made once, step by step, and only if there is nothing to serve."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
from rich.console import Console

from control_plane.launcher import starter
from control_plane.launcher.console import Screen
from control_plane.registry.model_directory import installed_models, is_sealed
from control_plane.settings import Settings
from control_plane.subprocesses import ChildEvent, ChildFailed
from triton_backend.version_folder import seal

pytestmark = pytest.mark.unit


class Children:
    """Plays the recipe and the exporter: makes the folder that is the command's last word."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.failing: str | None = None

    def __call__(
        self,
        command: Sequence[str],
        on_event: Callable[[ChildEvent], None],
        environment: Mapping[str, str],
        folder: Path,
    ) -> None:
        self.ran.append(command[2])
        on_event(ChildEvent("step", {"step": "work", "done": 0, "total": 1}))
        if command[2] == self.failing:
            raise ChildFailed("it failed")
        out = Path(command[-1])
        out.mkdir()
        (out / "config.json").write_text(json.dumps({"by": command[2]}))
        if command[2] == "exporters":
            seal(out, source={}, environment={})


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings.from_environment({"LLMOS_HOME": str(tmp_path), "LLMOS_MODEL_REPOSITORY": str(tmp_path / "models")})


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> Children:
    children = Children()
    monkeypatch.setattr(starter, "run_child", children)
    return children


@pytest.fixture
def screen() -> Screen:
    return Screen(Console(file=io.StringIO(), width=200))


TRAIN, EXPORT = "control_plane.training.recipes.pretrain", "exporters"


def test_model_is_trained_exported_and_installed(settings: Settings, children: Children, screen: Screen) -> None:
    model = starter.make_starter(settings, screen)
    assert (model.name, model.version) == ("starter", 1)
    assert children.ran == [TRAIN, EXPORT]
    assert installed_models(settings.model_repository) == [model]
    assert isinstance(screen.console.file, io.StringIO) and "train starter" in screen.console.file.getvalue()


def test_second_time_nothing_is_trained_or_exported_again(
    settings: Settings, children: Children, screen: Screen
) -> None:
    first = starter.make_starter(settings, screen)
    (first.folder / "config.json").write_text("damaged")
    second = starter.make_starter(settings, screen)
    assert children.ran == [TRAIN, EXPORT]
    assert is_sealed(second.folder)


def test_start_that_failed_goes_on_where_it_was(settings: Settings, children: Children, screen: Screen) -> None:
    children.failing = EXPORT
    with pytest.raises(ChildFailed):
        starter.make_starter(settings, screen)
    children.failing = None
    starter.make_starter(settings, screen)
    assert children.ran == [TRAIN, EXPORT, EXPORT]


def test_changed_export_is_made_again(settings: Settings, children: Children, screen: Screen) -> None:
    starter.make_starter(settings, screen)
    (settings.model_repository / "starter").rename(settings.home / "removed")
    (settings.versions_dir / "starter" / "1" / "config.json").write_text("{}")
    starter.make_starter(settings, screen)
    assert children.ran == [TRAIN, EXPORT, EXPORT]
