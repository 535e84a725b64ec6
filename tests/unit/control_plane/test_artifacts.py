"""The artifact store, on a disk and on another filesystem: complete or absent, verified on both ways."""

from __future__ import annotations

import json
import uuid
from pathlib import Path

import pytest

from control_plane import durable_folders
from control_plane.artifacts import ArtifactError, ArtifactStore, sealed_names
from control_plane.errors import NotFound
from triton_backend.errors import VersionFolderError
from triton_backend.version_folder import MANIFEST_JSON, digest, seal, verify

pytestmark = pytest.mark.unit


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "version"
    (folder / "deep").mkdir(parents=True)
    (folder / "model.json").write_text("{}")
    (folder / "deep" / "weights").write_bytes(b"\0" * 1000)
    seal(folder, {"checkpoint": "tiny"}, {})
    return folder


@pytest.fixture(params=["disk", "memory"])
def store(request, tmp_path) -> ArtifactStore:
    return ArtifactStore(str(tmp_path / "store") if request.param == "disk" else f"memory://{uuid.uuid4().hex}")


def test_what_goes_in_comes_out_under_its_digest(store, folder, tmp_path):
    assert store.digests() == []
    wanted = store.put(folder)
    assert wanted == digest(folder)
    assert (store.has(wanted), store.digests()) == (True, [wanted])
    store.get(wanted, tmp_path / "copy")
    verify(tmp_path / "copy")
    assert digest(tmp_path / "copy") == wanted
    assert (tmp_path / "copy" / "deep" / "weights").read_bytes() == b"\0" * 1000


def test_the_copy_shares_no_bytes_with_its_source(tmp_path, folder):
    store = ArtifactStore(str(tmp_path / "store"))
    wanted = store.put(folder)
    (folder / "model.json").write_text("edited")
    store.get(wanted, tmp_path / "copy")
    assert (tmp_path / "copy" / "model.json").read_text() == "{}"


class Cancelled(Exception):
    pass


@pytest.mark.parametrize("num_checks", [0, 2])
def test_a_copy_that_is_called_off_leaves_no_artifact_and_can_be_made_later(
    store, folder, tmp_path, monkeypatch, num_checks
):
    monkeypatch.setattr(durable_folders, "CHUNK_BYTES", 400)
    checks = iter(range(num_checks))

    def check() -> None:
        if next(checks, None) is None:
            raise Cancelled

    with pytest.raises(Cancelled):
        store.put(folder, check=check)
    assert store.digests() == []
    assert [path.name for path in (tmp_path / "store").glob("*")] in ([], [".lock"])
    assert store.put(folder, check=lambda: None) == digest(folder)


def test_a_changed_folder_is_not_stored(store, folder):
    (folder / "model.json").write_text("edited")
    with pytest.raises(ArtifactError, match=r"model\.json differs"):
        store.put(folder)
    assert store.digests() == []


def test_an_artifact_without_its_manifest_is_absent_and_can_be_stored_again(tmp_path, folder):
    store = ArtifactStore(str(tmp_path / "store"))
    wanted = store.put(folder)
    (tmp_path / "store" / wanted / MANIFEST_JSON).unlink()
    assert (store.has(wanted), store.digests()) == (False, [])
    with pytest.raises(NotFound):
        store.get(wanted, tmp_path / "copy")
    assert store.put(folder) == wanted
    store.get(wanted, tmp_path / "copy")


@pytest.mark.parametrize("damage", ["content", "missing", "manifest"])
def test_a_damaged_artifact_is_refused_and_leaves_nothing(tmp_path, folder, damage):
    store = ArtifactStore(str(tmp_path / "store"))
    wanted = store.put(folder)
    stored = tmp_path / "store" / wanted
    if damage == "content":
        (stored / "deep" / "weights").write_bytes(b"\1" * 1000)
    elif damage == "missing":
        (stored / "model.json").unlink()
    else:
        document = json.loads((stored / MANIFEST_JSON).read_text())
        (stored / MANIFEST_JSON).write_text(json.dumps({**document, "source": {"checkpoint": "other"}}))
    with pytest.raises(ArtifactError, match=wanted):
        store.get(wanted, tmp_path / "copy")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store", "version"]


@pytest.mark.parametrize("damage", ["content", "missing", "extra", "manifest"])
def test_a_damaged_artifact_is_replaced_when_it_is_stored_again(store, folder, tmp_path, damage):
    wanted = store.put(folder)
    stored = store._path(wanted)
    if damage == "content":
        store._files.pipe_file(f"{stored}/deep/weights", b"\1" * 1000)
    elif damage == "missing":
        store._files.rm_file(f"{stored}/model.json")
    elif damage == "extra":
        store._files.pipe_file(f"{stored}/deep/more", b"")
    else:
        store._files.pipe_file(f"{stored}/{MANIFEST_JSON}", b"{")
    assert store.put(folder) == wanted
    store.get(wanted, tmp_path / "copy")
    assert store.digests() == [wanted]


def test_an_undamaged_artifact_is_not_written_again(tmp_path, folder):
    store = ArtifactStore(str(tmp_path / "store"))
    stored = tmp_path / "store" / store.put(folder) / "model.json"
    before = stored.stat()
    store.put(folder)
    assert stored.stat() == before


def test_delete_forgets_and_may_be_repeated(store, folder):
    wanted = store.put(folder)
    store.delete(wanted)
    store.delete(wanted)
    assert store.digests() == []


def test_what_the_manifest_does_not_name_is_not_copied(folder, tmp_path):
    store = ArtifactStore(f"memory://{uuid.uuid4().hex}")
    wanted = store.put(folder)
    store._files.pipe_file(f"{store._root}/{wanted}/../../EVIL", b"x")
    store._files.pipe_file(f"{store._root}/{wanted}/more", b"x")
    store.get(wanted, tmp_path / "here" / "copy")
    assert [path for path in tmp_path.rglob("*") if path.name in ("EVIL", "more")] == []


@pytest.mark.parametrize("name", ["../out", "/out", "deep/../../out"])
def test_a_manifest_that_leads_out_of_its_folder_is_refused(name):
    with pytest.raises(VersionFolderError, match="outside of the folder"):
        sealed_names(json.dumps({"files": {"model.json": {}, name: {}}}).encode())


@pytest.mark.parametrize("name", ["..", "", "/etc", "0" * 63, "0" * 65, "G" * 64, "../" + "0" * 61])
def test_what_is_no_digest_names_nothing(store, name, tmp_path):
    assert not store.has(name)
    store.delete(name)
    with pytest.raises(NotFound):
        store.get(name, tmp_path / "copy")


def test_a_store_that_cannot_be_written_says_so(tmp_path, folder):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot store"):
        ArtifactStore(str(tmp_path / "file")).put(folder)
