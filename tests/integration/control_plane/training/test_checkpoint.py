"""The output folder appears whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from control_plane.training.checkpoint import staged_folder
from control_plane.training.errors import OutputExists

pytestmark = pytest.mark.integration


def test_folder_appears_when_complete(tmp_path: Path) -> None:
    out = tmp_path / "models" / "starter"
    with staged_folder(out) as folder:
        (folder / "config.json").write_text("{}")
        assert not out.exists()
    assert [path.name for path in out.parent.iterdir()] == ["starter"]
    assert (out / "config.json").read_text() == "{}"


def test_empty_folder_is_filled(tmp_path: Path) -> None:
    out = tmp_path / "starter"
    out.mkdir()
    with staged_folder(out) as folder:
        (folder / "config.json").write_text("{}")
    assert (out / "config.json").is_file()


def test_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), staged_folder(tmp_path / "starter") as folder:
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("taken_by", ["file", "folder"])
def test_taken_folder_is_refused_and_kept(tmp_path: Path, taken_by: str) -> None:
    out = tmp_path / "starter"
    kept = out if taken_by == "file" else out / "mine"
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("keep")
    with pytest.raises(OutputExists, match="choose another output folder"), staged_folder(out):
        pass
    assert kept.read_text() == "keep"
