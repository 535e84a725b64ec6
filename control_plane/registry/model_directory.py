"""Model directories: what lies in Triton's model repository, and how a version gets there.

A version folder is verified, copied beside its final place and renamed into it, so Triton never sees half of one. The
copy shares no bytes with its source: whoever edits the source later changes nothing that is being served.

    model_repository/
      chat/
        config.pbtxt        the interface; names the versions that are served
        1/ 2/               version folders, never changed once there
        adapters/           LoRA adapters
      chat.canary/          versions above production (registry.places)
        config.pbtxt  3/  adapters -> ../chat/adapters

It knows files only; loading is the reconciler's work.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from control_plane import durable_folders
from control_plane.errors import BadRequest, ControlPlaneError
from control_plane.registry.places import CANARY_SUFFIX, Place, model_of, possible_places
from triton_backend.errors import VersionFolderError
from triton_backend.protocol import INPUTS, OUTPUTS, TensorSpec
from triton_backend.version_folder import MANIFEST_JSON, digest, read_manifest, verify

if TYPE_CHECKING:
    from control_plane.artifacts import ArtifactStore

CONFIG_PBTXT = "config.pbtxt"
ADAPTERS = "adapters"
BACKEND = "llm"
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


class InstallError(ControlPlaneError):
    """A version cannot be installed: it is damaged, or its place is taken."""

    status = 409
    code = "install_failed"


@dataclass(frozen=True)
class InstalledModel:
    """A model directory and the highest version in it."""

    name: str
    version: int
    folder: Path


def check_name(name: str) -> str:
    """Return ``name`` if it may name a model; raises BadRequest."""
    if not NAME.fullmatch(name) or name.endswith(CANARY_SUFFIX):
        raise BadRequest(
            f"model name {name!r:.100} is not allowed; expected 1 to 64 lower-case letters, digits, '.', '_' and '-', "
            f"beginning with a letter or digit and not ending in {CANARY_SUFFIX!r}"
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
    _make_adapters(repository, Place(name, version))
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
    write_config(repository, name, [version])
    return InstalledModel(name, version, target)


def ensure_installed(repository: Path, store: ArtifactStore, place: Place, wanted: str) -> None:
    """See that the folder of ``place`` is the version with digest ``wanted``: copied from beside, or from the store.

    What else lies there is replaced. Raises NotFound, ArtifactError or InstallError; needs that Triton does not load it
    now.
    """
    target = folder_of(repository, place)
    if _digest_of(target) == wanted:
        return
    _make_adapters(repository, place)
    remove_version(repository, place)
    for other in possible_places(model_of(place), place.version):
        source = folder_of(repository, other)
        if other != place and _digest_of(source) == wanted and is_sealed(source):
            _copy(source, target)
            return
    store.get(wanted, target)


def _copy(source: Path, target: Path) -> None:
    """Copied, not linked: a link changes the source's inodes, and Triton then loads the source anew."""
    staged = target.with_name(f".{target.name}.staged-{os.getpid()}")
    shutil.rmtree(staged, ignore_errors=True)
    try:
        durable_folders.copy_files(source, [*read_manifest(source)["files"], MANIFEST_JSON], staged)
        os.rename(staged, target)
    except OSError as error:
        shutil.rmtree(staged, ignore_errors=True)
        why = durable_folders.explain(error, target.parent, size_bytes(source))
        raise InstallError(f"cannot copy {source} to {target}: {why}") from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def find_files(repository: Path, store: ArtifactStore, name: str, number: int, wanted: str, spare: Path) -> Path:
    """A folder with the files of a version: where it is installed, or else ``spare``, into which it is fetched once.

    Raises NotFound or ArtifactError.
    """
    for place in possible_places(name, number):
        folder = folder_of(repository, place)
        if _digest_of(folder) == wanted:
            return folder
    if not spare.exists():  # It appears whole.
        store.get(wanted, spare)
    return spare


def remove_version(repository: Path, place: Place) -> None:
    """Remove a version folder, in one step for those who look; one that is not there is no error."""
    folder = folder_of(repository, place)
    removed = folder.with_name(f".{folder.name}.removed-{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        os.rename(folder, removed)
    shutil.rmtree(removed, ignore_errors=True)


def folder_of(repository: Path, place: Place) -> Path:
    return repository / place.model / str(place.version)


def fingerprint(folder: Path) -> int:
    """Changes whenever a file of a version does: newest change of any, in nanoseconds; 0 if it is not installed."""
    if not (folder / MANIFEST_JSON).is_file():
        return 0
    return max(map(_changed_ns, [folder, *folder.rglob("*")]))


def _changed_ns(path: Path) -> int:
    """0 for what is gone by now; of a link, which may lead nowhere, its own."""
    try:
        return path.lstat().st_mtime_ns
    except FileNotFoundError:
        return 0


def size_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def installed_models(repository: Path) -> list[InstalledModel]:
    """Every model directory with a configuration and a complete version, by name; without those of canaries."""
    models = []
    for directory in sorted(repository.glob("*/")) if repository.is_dir() else ():
        versions = _complete_versions(directory)
        is_model = NAME.fullmatch(directory.name) and not directory.name.endswith(CANARY_SUFFIX)
        if is_model and versions and (directory / CONFIG_PBTXT).is_file():
            models.append(InstalledModel(directory.name, versions[-1], directory / str(versions[-1])))
    return models


def is_sealed(version_folder: Path) -> bool:
    """Whether a version folder is complete and unchanged; reads all of it."""
    try:
        verify(version_folder)
    except VersionFolderError:
        return False
    return True


def write_config(repository: Path, model: str, versions: Sequence[int]) -> None:
    """Write ``config.pbtxt`` of a Triton model, so that loading it loads ``versions`` and no others."""
    path = repository / model / CONFIG_PBTXT
    staged = path.with_name(f".{CONFIG_PBTXT}.{os.getpid()}")
    staged.write_text(render_config(model, versions), encoding="utf-8")
    staged.rename(path)


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


def _digest_of(folder: Path) -> str | None:
    return digest(folder) if (folder / MANIFEST_JSON).is_file() else None


def _make_adapters(repository: Path, place: Place) -> None:
    """See that there is a folder for adapters, and that versions in ``chat.canary`` share that of ``chat``.

    It is made before anything is loaded: what is new in it makes Triton load the model anew at the next change.
    """
    adapters = repository / model_of(place) / ADAPTERS
    adapters.mkdir(parents=True, exist_ok=True)
    link = repository / place.model / ADAPTERS
    if not link.exists():
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(Path("..", model_of(place), ADAPTERS))


def _complete_versions(directory: Path) -> list[int]:
    # Triton ignores versions with a leading zero.
    names = (path.parent.name for path in directory.glob(f"*/{MANIFEST_JSON}"))
    return sorted(int(name) for name in names if re.fullmatch(r"[1-9][0-9]{0,8}", name))
