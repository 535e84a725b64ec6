"""Installing version folders: verified, complete, never half there."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from control_plane.artifacts import ArtifactStore
from control_plane.errors import BadRequest, NotFound
from control_plane.registry.model_directory import (
    InstallError,
    check_name,
    ensure_installed,
    fingerprint,
    install,
    installed_models,
    remove_version,
    render_config,
    write_config,
)
from control_plane.registry.places import Place
from triton_backend.protocol import INPUTS, OUTPUTS
from triton_backend.version_folder import seal

pytestmark = pytest.mark.unit


@pytest.fixture
def version_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "exported"
    (folder / "sub").mkdir(parents=True)
    (folder / "model.onnx.data").write_bytes(bytes(1000))
    (folder / "sub" / "more.json").write_text("{}")
    seal(folder, source={}, environment={})
    return folder


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "README.md").write_text("not a model")
    return folder


def test_installed_version_is_listed_with_its_folder(version_folder: Path, repository: Path) -> None:
    model = install(version_folder, repository, "chat", 1)
    assert (model.name, model.version, model.folder) == ("chat", 1, repository / "chat" / "1")
    assert installed_models(repository) == [model]
    assert sorted(path.name for path in (repository / "chat").iterdir()) == ["1", "adapters", "config.pbtxt"]


def test_install_shares_no_bytes_with_its_source(version_folder: Path, repository: Path) -> None:
    model = install(version_folder, repository, "chat", 1)
    copy = model.folder / "model.onnx.data"
    assert copy.stat().st_nlink == 1
    (version_folder / "model.onnx.data").write_bytes(b"edited")
    assert copy.read_bytes() == bytes(1000)


def test_damaged_folder_is_refused_by_the_name_of_its_file(version_folder: Path, repository: Path) -> None:
    (version_folder / "model.onnx.data").write_bytes(bytes(999) + b"x")
    with pytest.raises(InstallError, match=r"model\.onnx\.data differs"):
        install(version_folder, repository, "chat", 1)
    assert installed_models(repository) == []


def test_unfinished_export_is_refused(version_folder: Path, repository: Path) -> None:
    (version_folder / "manifest.json").unlink()
    with pytest.raises(InstallError, match="did not finish"):
        install(version_folder, repository, "chat", 1)


def test_version_is_never_replaced(version_folder: Path, repository: Path) -> None:
    install(version_folder, repository, "chat", 1)
    with pytest.raises(InstallError, match="exists already"):
        install(version_folder, repository, "chat", 1)


def test_failed_copy_leaves_nothing(version_folder: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", full_disk)
    with pytest.raises(InstallError, match="No space left"):
        install(version_folder, repository, "chat", 1)
    assert [path.name for path in (repository / "chat").iterdir()] == ["adapters"]


@pytest.mark.parametrize(
    "name", ["", "Chat", "../chat", "a/b", ".hidden", "-x", "a" * 65, "chat\n", "größe", "chat.canary"]
)
def test_names_that_could_leave_the_repository_are_refused(name: str, version_folder: Path, repository: Path) -> None:
    with pytest.raises(BadRequest, match="not allowed"):
        install(version_folder, repository, name, 1)


@pytest.mark.parametrize("name", ["a", "chat", "qwen2.5-0.5b_instruct", "canary", "0"])
def test_usual_names_are_allowed(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize("version", [0, -1])
def test_version_numbers_begin_at_1(version: int, version_folder: Path, repository: Path) -> None:
    with pytest.raises(BadRequest, match="expected a whole number ≥ 1"):
        install(version_folder, repository, "chat", version)


def test_a_model_is_listed_with_its_highest_version(version_folder: Path, repository: Path) -> None:
    for version in (2, 10, 9):
        install(version_folder, repository, "chat", version)
    assert [model.version for model in installed_models(repository)] == [10]


def test_config_names_the_versions_to_load(version_folder: Path, repository: Path) -> None:
    install(version_folder, repository, "chat", 1)
    write_config(repository, "chat", [1, 4])
    assert re.findall(r"versions: (\d+)", (repository / "chat" / "config.pbtxt").read_text()) == ["1", "4"]


def test_version_is_fetched_from_the_store_and_copied_from_beside(
    version_folder: Path, repository: Path, tmp_path: Path
) -> None:
    store = ArtifactStore(str(tmp_path / "store"))
    digest = store.put(version_folder)
    canary, chat = Place("chat.canary", 2), Place("chat", 2)
    ensure_installed(repository, store, canary, digest)
    copy = repository / "chat.canary" / "2" / "model.onnx.data"
    assert copy.read_bytes() == bytes(1000) and copy.stat().st_nlink == 1
    store.delete(digest)
    ensure_installed(repository, store, chat, digest)
    assert copy.stat().st_nlink == 1 and (repository / "chat" / "2" / "sub" / "more.json").is_file()
    (repository / "chat" / "adapters" / "mine").mkdir()
    assert (repository / "chat.canary" / "adapters" / "mine").is_dir()
    remove_version(repository, canary)
    remove_version(repository, canary)
    assert not copy.parent.exists() and (repository / "chat" / "2" / "model.onnx.data").is_file()


def test_what_is_not_the_wanted_version_is_replaced(version_folder: Path, repository: Path, tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path / "store"))
    digest = store.put(version_folder)
    place = Place("chat", 1)
    (repository / "chat" / "1").mkdir(parents=True)
    (repository / "chat" / "1" / "half").touch()
    assert fingerprint(repository / "chat" / "1") == 0
    ensure_installed(repository, store, place, digest)
    assert not (repository / "chat" / "1" / "half").exists() and fingerprint(repository / "chat" / "1") > 0
    with pytest.raises(NotFound, match="is not in"):
        ensure_installed(repository, store, place, "0" * 64)


def test_damaged_copy_beside_is_not_copied(version_folder: Path, repository: Path, tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path / "store"))
    digest = store.put(version_folder)
    ensure_installed(repository, store, Place("chat", 1), digest)
    (repository / "chat" / "1" / "model.onnx.data").write_bytes(b"damaged")
    ensure_installed(repository, store, Place("chat.canary", 1), digest)
    assert (repository / "chat.canary" / "1" / "model.onnx.data").read_bytes() == bytes(1000)


def test_half_made_directories_are_not_models(version_folder: Path, repository: Path) -> None:
    (repository / "empty").mkdir()
    (repository / "no-version" / "1").mkdir(parents=True)
    (repository / "no-version" / "config.pbtxt").touch()
    (repository / "no-config" / "1").mkdir(parents=True)
    (repository / "no-config" / "1" / "manifest.json").touch()
    install(version_folder, repository, "chat", 1)
    (repository / "chat" / ".2.staged-1").mkdir()
    (repository / "chat" / ".2.staged-1" / "manifest.json").touch()
    install(version_folder, repository, "other", 1)
    (repository / "other").rename(repository / "chat.canary")
    assert [(model.name, model.version) for model in installed_models(repository)] == [("chat", 1)]
    assert installed_models(repository / "absent") == []


def test_fingerprint_follows_every_file(version_folder: Path, repository: Path) -> None:
    model = install(version_folder, repository, "chat", 1)
    before = fingerprint(model.folder)
    os.utime(model.folder / "sub" / "more.json", ns=(before + 10**9, before + 10**9))
    assert fingerprint(model.folder) > before


def test_config_declares_exactly_the_tensors_of_the_protocol() -> None:
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    config = text_format.Parse(render_config("chat", [1, 2]), model_config_pb2.ModelConfig())
    types = model_config_pb2.DataType.Name
    assert [(i.name, types(i.data_type), tuple(i.dims), i.optional) for i in config.input] == [
        (spec.name, spec.data_type, spec.dims, spec.optional) for spec in INPUTS
    ]
    assert [(o.name, types(o.data_type), tuple(o.dims)) for o in config.output] == [
        (spec.name, spec.data_type, spec.dims) for spec in OUTPUTS
    ]
    assert (config.backend, config.max_batch_size, config.model_transaction_policy.decoupled) == ("llm", 0, True)
    assert list(config.version_policy.specific.versions) == [1, 2]
    assert [(group.kind, group.count) for group in config.instance_group] == [
        (model_config_pb2.ModelInstanceGroup.KIND_MODEL, 1)
    ]
