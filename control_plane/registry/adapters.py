"""LoRA adapters of a model: the folders beside its versions, which its engines load at the first request that asks.

    model_repository/chat/adapters/poet/    adapter.safetensors  adapter.json  manifest.json    (exporters.adapters)

An adapter fits one version, whose digest it names. The folders themselves are the record: nothing is kept in SQL.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from control_plane import durable_folders
from control_plane.errors import BadRequest, Conflict, NotFound
from control_plane.registry.model_directory import ADAPTERS, size_bytes
from control_plane.registry.services import get_version
from control_plane.registry.tables import PRODUCTION, Alias, Model, Version
from triton_backend.errors import VersionFolderError
from triton_backend.version_folder import digest, read_manifest

ADAPTER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""As the engine reads names of adapters."""
FACTS = "adapter.json"


@dataclass(frozen=True)
class InstalledAdapter:
    """``base_digest`` is that of the version it fits. ``problem`` says why it cannot be used, if that is known."""

    name: str
    size_bytes: int
    digest: str | None = None
    rank: int | None = None
    base_digest: str | None = None
    problem: str | None = None


def find_adapters(repository: Path, model: str) -> list[InstalledAdapter]:
    """By name. What is shown is what the folders say; the engine verifies one before it uses it."""
    root = repository / model / ADAPTERS
    folders = sorted(root.iterdir()) if root.is_dir() else []
    return [_read(folder) for folder in folders if _is_adapter(folder)]


def target_version(model: Model, number: int | None, aliases: list[Alias]) -> Version:
    """The version that an adapter is meant for: production, if none is named. Raises NotFound or Conflict."""
    if number is not None:
        return get_version(model.name, number)
    for alias in aliases:
        if alias.name == PRODUCTION:
            return alias.version
    raise Conflict(f"model {model.name!r} has no production version; name the version that the adapter is meant for")


def check_adapter_name(name: str) -> str:
    """Raises BadRequest."""
    if not ADAPTER.fullmatch(name):
        raise BadRequest(
            f"adapter name {name!r:.200} is not allowed; expected 1 to 128 letters, digits, '.', '_' and '-', "
            "beginning with a letter or digit"
        )
    return name


def install_adapter(folder: Path, repository: Path, model: str, name: str) -> None:
    """Put a copy of a sealed adapter folder into place, whole; one that has the name is replaced."""
    root = repository / model / ADAPTERS
    with durable_folders.only_writer(root):
        staged = root / f".{name}.staged"
        durable_folders.require_space(root, size_bytes(folder))
        shutil.copytree(folder, staged)
        durable_folders.replace_folder(staged, root / name)


def remove_adapter(repository: Path, model: str, name: str) -> None:
    """Requests that run with it go on; the next one is refused. Raises NotFound."""
    root = repository / model / ADAPTERS
    if not _is_adapter(root / name):
        raise NotFound(f"model {model!r} has no adapter {name!r:.200}; GET /api/v1/models/{model}/adapters lists them")
    with durable_folders.only_writer(root):
        durable_folders.remove_folder(root / name)


def _is_adapter(folder: Path) -> bool:
    # The engine takes no links.
    return ADAPTER.fullmatch(folder.name) is not None and folder.is_dir() and not folder.is_symlink()


def _read(folder: Path) -> InstalledAdapter:
    size = 0
    try:
        size = size_bytes(folder)
        read_manifest(folder)
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        rank, base = int(facts["rank"]), str(facts["base"]["digest"])
        return InstalledAdapter(folder.name, size, digest(folder), rank, base)
    except VersionFolderError as error:
        problem = str(error.args[0])
    except (OSError, ArithmeticError, ValueError, KeyError, TypeError, RecursionError) as error:
        problem = f"{FACTS} cannot be read: {error!r}; install the adapter again"
    return InstalledAdapter(folder.name, size, problem=problem)
