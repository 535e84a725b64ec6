"""Model directories: what lies in Triton's model repository, and how a version gets there.

A version folder is verified, copied beside its final place and renamed into it, so Triton never sees half of one. The
copy shares no bytes with its source: whoever edits the source later changes nothing that is being served.

    model_repository/
      chat/
        config.pbtxt        the interface; names the version that is served
        1/ 2/               version folders, never changed once there

It knows files only; loading is the reconciler's work.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from control_plane.errors import BadRequest, ControlPlaneError
from triton_backend.errors import VersionFolderError
from triton_backend.protocol import INPUTS, OUTPUTS, TensorSpec
from triton_backend.version_folder import MANIFEST_JSON, verify

CONFIG_PBTXT = "config.pbtxt"
BACKEND = "llm"
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


class InstallError(ControlPlaneError):
    """A version cannot be installed: it is damaged, or its place is taken."""

    status = 409
    code = "install_failed"


@dataclass(frozen=True)
class InstalledModel:
    """A model directory and the version in it that is to be served: the highest."""

    name: str
    version: int
    folder: Path

    @property
    def fingerprint(self) -> int:
        """Changes whenever a file of the version does; newest change of any of them, in nanoseconds."""
        paths = [self.folder, self.folder.parent / CONFIG_PBTXT, *self.folder.rglob("*")]
        return max(path.stat().st_mtime_ns for path in paths)

    @property
    def size_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())


def check_name(name: str) -> str:
    """Return ``name`` if it may name a model; raises BadRequest."""
    if not NAME.fullmatch(name):
        raise BadRequest(
            f"model name {name!r} is not allowed; expected 1 to 64 lower-case letters, digits, '.', '_' and '-', "
            "beginning with a letter or digit"
        )
    return name


def install(version_folder: Path, repository: Path, name: str, version: int) -> InstalledModel:
    """Put a verified copy of ``version_folder`` at ``repository/name/version``; raises InstallError or BadRequest."""
    model_directory = repository / check_name(name)
    target = model_directory / str(version)
    if version < 1:
        raise BadRequest(f"version has value {version}; expected a whole number ≥ 1")
    if target.exists():
        raise InstallError(f"{target} exists already; versions are never changed, install the next number")
    model_directory.mkdir(parents=True, exist_ok=True)
    staged = model_directory / f".{version}.staged-{os.getpid()}"
    try:
        verify(version_folder)
        shutil.copytree(version_folder, staged)
        os.rename(staged, target)
    except VersionFolderError as error:
        raise InstallError(error.args[0]) from error
    except OSError as error:
        raise InstallError(f"cannot install {version_folder} as {target}: {error}") from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    write_config(repository, name)
    return next(model for model in installed_models(repository) if model.name == name)


def installed_models(repository: Path) -> list[InstalledModel]:
    """Every model directory with a configuration and a complete version, by name."""
    models = []
    for directory in sorted(repository.glob("*/")) if repository.is_dir() else ():
        versions = _complete_versions(directory)
        if NAME.fullmatch(directory.name) and versions and (directory / CONFIG_PBTXT).is_file():
            models.append(InstalledModel(directory.name, versions[-1], directory / str(versions[-1])))
    return models


def is_sealed(version_folder: Path) -> bool:
    """Whether a version folder is complete and unchanged; reads all of it."""
    try:
        verify(version_folder)
    except VersionFolderError:
        return False
    return True


def write_config(repository: Path, name: str) -> bool:
    """Write ``config.pbtxt`` for the highest version of a model; returns whether that changed anything."""
    directory = repository / check_name(name)
    path, text = directory / CONFIG_PBTXT, render_config(name, _complete_versions(directory)[-1:])
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return False
    staged = directory / f".{CONFIG_PBTXT}.{os.getpid()}"
    staged.write_text(text, encoding="utf-8")
    staged.rename(path)
    return True


def refresh_configs(repository: Path) -> list[str]:
    """Rewrite configurations that an older release of llmos wrote, and return the names of their models."""
    return [model.name for model in installed_models(repository) if write_config(repository, model.name)]


def render_config(name: str, versions: Sequence[int]) -> str:
    """The complete ``config.pbtxt``: Triton is told not to guess anything."""
    # Imported here: it brings gRPC along, which those who only list models do not need.
    from google.protobuf import json_format, text_format
    from tritonclient.grpc import model_config_pb2

    document = {
        "name": name,
        "backend": BACKEND,
        # The engine batches by itself, and answers a request with many responses.
        "max_batch_size": 0,
        "model_transaction_policy": {"decoupled": True},
        "version_policy": {"specific": {"versions": [str(version) for version in versions]}},
        # One process with one engine; devices are the engine's business.
        "instance_group": [{"kind": "KIND_MODEL", "count": 1}],
        "input": [{**_tensor(spec), "optional": spec.optional} for spec in INPUTS],
        "output": [_tensor(spec) for spec in OUTPUTS],
    }
    config = json_format.Parse(json.dumps(document), model_config_pb2.ModelConfig())
    return f"# Written by llmos; do not edit.\n{text_format.MessageToString(config)}"


def _tensor(spec: TensorSpec) -> dict[str, object]:
    return {"name": spec.name, "data_type": spec.data_type, "dims": [str(dim) for dim in spec.dims]}


def _complete_versions(directory: Path) -> list[int]:
    # Triton ignores versions with a leading zero.
    names = (path.parent.name for path in directory.glob(f"*/{MANIFEST_JSON}"))
    return sorted(int(name) for name in names if re.fullmatch(r"[1-9][0-9]{0,8}", name))
