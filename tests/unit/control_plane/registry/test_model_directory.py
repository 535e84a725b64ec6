"""Installing version folders: verified, complete, never half there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from control_plane.errors import BadRequest
from control_plane.registry.model_directory import (
    InstallError,
    check_name,
    install,
    installed_models,
    refresh_configs,
    render_config,
)
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
    assert sorted(path.name for path in (repository / "chat").iterdir()) == ["1", "config.pbtxt"]


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
    assert list((repository / "chat").iterdir()) == []


@pytest.mark.parametrize("name", ["", "Chat", "../chat", "a/b", ".hidden", "-x", "a" * 65, "chat\n", "größe"])
def test_names_that_could_leave_the_repository_are_refused(name: str, version_folder: Path, repository: Path) -> None:
    with pytest.raises(BadRequest, match="not allowed"):
        install(version_folder, repository, name, 1)


@pytest.mark.parametrize("name", ["a", "chat", "qwen2.5-0.5b_instruct", "chat.canary", "0"])
def test_usual_names_are_allowed(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize("version", [0, -1])
def test_version_numbers_begin_at_1(version: int, version_folder: Path, repository: Path) -> None:
    with pytest.raises(BadRequest, match="expected a whole number ≥ 1"):
        install(version_folder, repository, "chat", version)


def test_highest_version_is_served(version_folder: Path, repository: Path) -> None:
    for version in (2, 10, 9):
        install(version_folder, repository, "chat", version)
    assert [model.version for model in installed_models(repository)] == [10]
    assert "versions: 10\n" in (repository / "chat" / "config.pbtxt").read_text()


def test_half_made_directories_are_not_models(version_folder: Path, repository: Path) -> None:
    (repository / "empty").mkdir()
    (repository / "no-version" / "1").mkdir(parents=True)
    (repository / "no-version" / "config.pbtxt").touch()
    (repository / "no-config" / "1").mkdir(parents=True)
    (repository / "no-config" / "1" / "manifest.json").touch()
    install(version_folder, repository, "chat", 1)
    (repository / "chat" / ".2.staged-1").mkdir()
    (repository / "chat" / ".2.staged-1" / "manifest.json").touch()
    assert [(model.name, model.version) for model in installed_models(repository)] == [("chat", 1)]
    assert installed_models(repository / "absent") == []


def test_fingerprint_follows_every_file(version_folder: Path, repository: Path) -> None:
    model = install(version_folder, repository, "chat", 1)
    before = model.fingerprint
    os.utime(model.folder / "sub" / "more.json", ns=(before + 10**9, before + 10**9))
    assert model.fingerprint > before


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


def test_config_of_an_older_release_is_rewritten(version_folder: Path, repository: Path) -> None:
    install(version_folder, repository, "chat", 1)
    config = repository / "chat" / "config.pbtxt"
    current = config.read_text()
    config.write_text('name: "chat"')
    assert refresh_configs(repository) == ["chat"]
    assert config.read_text() == current
    assert refresh_configs(repository) == []
