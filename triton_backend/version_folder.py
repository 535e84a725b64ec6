"""The seal of a version folder: ``manifest.json`` with size and sha256 of every file.

The manifest is written last, so a folder that has one is complete; a folder whose files differ from it is refused by
name. Exporters seal, the control plane verifies before it installs, the engine verifies before it loads. Standard
library only.

    manifest.json = {"format": 1, "files": {"model.onnx": {"sha256": "…", "size_bytes": 1}, …},
                     "source": {…checkpoint facts…}, "environment": {"torch": "2.13.0", …}}
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from triton_backend.errors import VersionFolderError

MANIFEST_JSON = "manifest.json"
FORMAT = 1


def seal(folder: Path, source: Mapping[str, Any], environment: Mapping[str, str]) -> str:
    """Write ``manifest.json`` over everything in ``folder`` and return the folder's digest."""
    files = {
        name: {"sha256": sha256_of(folder / name), "size_bytes": (folder / name).stat().st_size}
        for name in _files_of(folder)
    }
    document = {"format": FORMAT, "files": files, "source": dict(source), "environment": dict(environment)}
    staged = folder / (MANIFEST_JSON + ".partial")
    with staged.open("w", encoding="utf-8") as stream:
        json.dump(document, stream, indent=2)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    staged.rename(folder / MANIFEST_JSON)
    return digest(folder)


def digest(folder: Path) -> str:
    """sha256 of the manifest, which covers every other file: the identity of a version."""
    return sha256_of(folder / MANIFEST_JSON)


def read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST_JSON
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise VersionFolderError(f"{folder} has no {MANIFEST_JSON}: the export did not finish; repeat it") from None
    except (OSError, ValueError) as error:
        raise VersionFolderError(f"cannot read {path}: {error}") from error
    is_manifest = isinstance(document, dict) and isinstance(document.get("files"), dict)
    if not is_manifest or document.get("format") != FORMAT:
        raise VersionFolderError(f"{path} is not a manifest of format {FORMAT}")
    return document


def verify(folder: Path) -> dict[str, Any]:
    """Check every file against the manifest and return it; raises VersionFolderError naming the first bad file."""
    manifest = read_manifest(folder)
    present = set(_files_of(folder))
    for name, expected in manifest["files"].items():
        if name not in present:
            raise VersionFolderError(f"{folder / name} is missing, but {MANIFEST_JSON} lists it; install it again")
        path = folder / name
        if path.stat().st_size != expected["size_bytes"] or sha256_of(path) != expected["sha256"]:
            raise VersionFolderError(
                f"{path} differs from {MANIFEST_JSON} (expected sha256 {expected['sha256'][:12]}…): "
                "the file was changed after it was sealed; install the version again"
            )
    extra = sorted(present - set(manifest["files"]))
    if extra:
        raise VersionFolderError(f"{folder / extra[0]} is not listed in {MANIFEST_JSON}; remove it or export again")
    return manifest


def sha256_of(path: Path) -> str:
    with path.open("rb") as stream:
        hasher = hashlib.sha256()
        while chunk := stream.read(1 << 20):
            hasher.update(chunk)
    return hasher.hexdigest()


def _files_of(folder: Path) -> list[str]:
    """Names of the files below ``folder`` but the manifest; links and devices are refused, they could point outside."""
    names = []
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise VersionFolderError(f"{path} is not a plain file; a version folder holds plain files only")
        if path.is_file() and path.parent == folder and path.name in (MANIFEST_JSON, MANIFEST_JSON + ".partial"):
            continue
        if path.is_file():
            names.append(path.relative_to(folder).as_posix())
    return names
