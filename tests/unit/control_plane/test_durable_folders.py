"""Folders that appear whole or not at all, also where somebody put links."""

from __future__ import annotations

import pytest

from control_plane import durable_folders

pytestmark = pytest.mark.unit


def folder_of(path, content: str):
    path.mkdir(parents=True)
    (path / "file").write_text(content)
    return path


@pytest.mark.parametrize("kind", ["link", "file", "folder"])
def test_whatever_has_the_name_is_replaced_and_what_a_link_leads_to_stays(tmp_path, kind):
    outside, root = folder_of(tmp_path / "outside", "outside"), tmp_path / "root"
    root.mkdir()
    for content in ("one", "two"):
        if kind == "link":
            durable_folders.remove_folder(root / "poet")
            (root / "poet").symlink_to(outside)
        elif kind == "file":
            durable_folders.remove_folder(root / "poet")
            (root / "poet").write_text("a file")
        with durable_folders.only_writer(root):
            durable_folders.replace_folder(folder_of(root / ".poet.staged", content), root / "poet")
        assert (root / "poet" / "file").read_text() == content
    assert sorted(path.name for path in root.iterdir()) == [".lock", "poet"]
    assert (outside / "file").read_text() == "outside"


def test_leftovers_that_are_links_do_not_stop_the_next_writer(tmp_path):
    outside, root = folder_of(tmp_path / "outside", "outside"), tmp_path / "root"
    root.mkdir()
    (root / ".poet.removed").symlink_to(outside)
    (root / ".poem.staged").write_text("a file")
    with durable_folders.only_writer(root):
        assert [path.name for path in root.iterdir()] == [".lock"]
    assert (outside / "file").exists()
