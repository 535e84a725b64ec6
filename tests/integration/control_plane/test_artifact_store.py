"""The artifact store on a real disk: power cuts, a full disk, kills, and several processes at once."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from control_plane import durable_folders
from control_plane.artifacts import ArtifactError, ArtifactStore
from control_plane.settings import PROJECT_ROOT
from tests.disks import small_disk
from triton_backend.version_folder import digest, seal

pytestmark = pytest.mark.integration

PUT = """
import sys
from pathlib import Path
from control_plane.artifacts import ArtifactStore

try:
    print(ArtifactStore(sys.argv[1]).put(Path(sys.argv[2])))
except Exception as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


def sealed(folder: Path, size_bytes: int) -> Path:
    (folder / "deep").mkdir(parents=True)
    (folder / "model.json").write_text("{}")
    for name in ("model.onnx.data", "deep/more"):
        (folder / name).write_bytes(os.urandom(size_bytes // 2))
    seal(folder, {}, {})
    return folder


def start_put(store: Path, folder: Path, **options) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PUT, str(store), str(folder)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=PROJECT_ROOT, stdout=pipe, stderr=pipe, text=True, **options)


class Disk:
    """What a power cut would leave: files and names that were not synced may be lost; here they always are."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._root, self._synced = root, set()
        self.after_cuts: list[Path] = []
        self._fsync, self._rename = os.fsync, os.rename
        monkeypatch.setattr(os, "fsync", self._note_sync)
        monkeypatch.setattr(os, "rename", self._note_rename)

    def _note_sync(self, descriptor: int) -> None:
        self._fsync(descriptor)
        self._synced.add(os.fstat(descriptor).st_ino)
        self._cut_power()

    def _note_rename(self, source: Path, target: Path) -> None:
        self._rename(source, target)
        # The new name is certain only when its folder is synced again.
        self._synced.discard(Path(target).parent.stat().st_ino)
        self._cut_power()

    def _cut_power(self) -> None:
        if not self._root.exists():
            return
        left = self._root.with_name(f"{self._root.name}-{len(self.after_cuts)}")
        shutil.copytree(self._root, left)
        for path in self._root.rglob("*"):
            lost = left / path.relative_to(self._root)
            if path.stat().st_ino in self._synced or not lost.exists():
                continue
            shutil.rmtree(lost) if lost.is_dir() else lost.write_bytes(b"")
        self.after_cuts.append(left)

    def is_certain(self, folder: Path) -> bool:
        """Whether the names in ``folder`` survive."""
        return folder.stat().st_ino in self._synced


@pytest.mark.parametrize("was_damaged", [False, True])
def test_after_a_power_cut_at_any_moment_what_looks_complete_is_whole(tmp_path, monkeypatch, was_damaged):
    folder = sealed(tmp_path / "version", 20_000)
    root = tmp_path / "store"
    wanted = digest(folder)
    if was_damaged:
        ArtifactStore(str(root)).put(folder)
        (root / wanted / "model.json").write_text("damaged")
    disk = Disk(root, monkeypatch)
    ArtifactStore(str(root)).put(folder)
    monkeypatch.undo()
    assert disk.is_certain(root)
    seen = set()
    for number, left in enumerate(disk.after_cuts):
        store = ArtifactStore(str(left))
        seen.add(store.has(wanted))
        if store.has(wanted):
            store.get(wanted, tmp_path / f"copy-{number}")
        assert ArtifactStore(str(left)).put(folder) == wanted
    assert seen == {False, True}


@pytest.fixture(name="small_disk")
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB."""
    with small_disk(tmp_path / "disk", "1m") as folder:
        yield folder


@pytest.mark.parametrize("is_seen_before", [True, False], ids=["before", "in the middle"])
def test_a_full_disk_says_how_much_is_needed_and_keeps_nothing(tmp_path, small_disk, monkeypatch, is_seen_before):
    folder = sealed(tmp_path / "version", 3 << 20)
    if not is_seen_before:
        monkeypatch.setattr(durable_folders, "require_space", lambda *_: None)
    store = ArtifactStore(str(small_disk / "store"))
    needs = r"needs 3\.0 MiB, 1\.0 MiB are free there; nothing was kept"
    with pytest.raises(ArtifactError, match=rf"cannot store .* No space left on device.*{needs}"):
        store.put(folder)
    assert os.listdir(small_disk / "store") == [".lock"]
    wanted = ArtifactStore(str(tmp_path / "large")).put(folder)
    with pytest.raises(ArtifactError, match=rf"cannot copy artifact .* No space left on device.*{needs}"):
        ArtifactStore(str(tmp_path / "large")).get(wanted, small_disk / "copy")
    assert sorted(os.listdir(small_disk)) == ["store"]


def test_files_that_may_not_grow_are_a_full_disk_too(tmp_path):
    folder = sealed(tmp_path / "version", 400_000)
    limits = (100_000, 100_000)
    process = start_put(
        tmp_path / "store", folder, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    )
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert said.startswith("ArtifactError: cannot store") and "it needs 0.4 MiB" in said
    assert os.listdir(tmp_path / "store") == [".lock"]


def test_many_processes_may_store_the_same_folder_while_others_read_it(tmp_path):
    folder = sealed(tmp_path / "version", 8 << 20)
    wanted, root = digest(folder), tmp_path / "store"
    store = ArtifactStore(str(root))
    writers = [start_put(root, folder) for _ in range(4)]
    number = 0
    while any(writer.poll() is None for writer in writers):
        if store.has(wanted):
            store.get(wanted, tmp_path / f"copy-{(number := number + 1)}")
            shutil.rmtree(tmp_path / f"copy-{number}")
    assert [writer.communicate() for writer in writers] == [(f"{wanted}\n", "")] * 4
    assert number > 0
    assert sorted(os.listdir(root)) == [".lock", wanted]


def test_what_a_killed_process_left_is_cleared_by_the_next(tmp_path):
    folder, root = sealed(tmp_path / "version", 64 << 20), tmp_path / "store"
    wanted = digest(folder)
    killed = start_put(root, folder)
    half = root / f".{wanted}.staged" / "model.onnx.data"
    # The copy is there for some hundredths of a second only.
    while not half.exists() and killed.poll() is None:
        pass
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert half.exists() and not ArtifactStore(str(root)).has(wanted)
    other = sealed(tmp_path / "other", 1000)
    ArtifactStore(str(root)).put(other)
    assert sorted(os.listdir(root)) == sorted([".lock", digest(other)])
