"""The artifact store: sealed folders under their digest, on a disk or in an object store (any fsspec URL).

    <url>/<sha256 of manifest.json>/model.onnx  model.json  …  manifest.json

The manifest is written last and deleted first, so an artifact that has one is complete. What comes in is verified
against its manifest, what goes out against the manifest and the digest that was asked for. It knows files only.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import fsspec

from control_plane.errors import ControlPlaneError, NotFound
from control_plane.settings import Settings
from triton_backend.errors import VersionFolderError
from triton_backend.version_folder import MANIFEST_JSON, digest, verify

DIGEST = re.compile(r"[0-9a-f]{64}")


class ArtifactError(ControlPlaneError):
    """An artifact is damaged, or the store cannot be read or written."""

    status = 500
    code = "artifact_error"


class ArtifactStore:
    """One store; may be used by many processes at once, because nothing in it ever changes."""

    def __init__(self, url: str) -> None:
        self._url = url
        filesystem, root = fsspec.core.url_to_fs(url)
        self._files: Any = filesystem
        self._root = root.rstrip("/")

    def put(self, folder: Path) -> str:
        """Store a sealed folder, unless it is there already, and return its digest; raises ArtifactError."""
        try:
            manifest = verify(folder)
            found = digest(folder)
            if not self.has(found):
                for name in (*manifest["files"], MANIFEST_JSON):
                    target = self._path(found, name)
                    self._files.makedirs(os.path.dirname(target), exist_ok=True)
                    self._files.put_file(str(folder / name), target)
            return found
        except VersionFolderError as error:
            raise ArtifactError(error.args[0]) from error
        except OSError as error:
            raise ArtifactError(f"cannot store {folder} in {self._url}: {error}") from error

    def get(self, wanted: str, target: Path) -> None:
        """Copy an artifact to ``target``, which must not exist; complete and verified, or not at all.

        Raises NotFound or ArtifactError.
        """
        if not self.has(wanted):
            raise NotFound(f"artifact {wanted} is not in {self._url}")
        staged = target.with_name(f".{target.name}.fetched-{os.getpid()}")
        shutil.rmtree(staged, ignore_errors=True)
        try:
            root = self._path(wanted)
            for path in self._files.find(root):
                copied = staged / path.removeprefix(f"{root}/")
                copied.parent.mkdir(parents=True, exist_ok=True)
                self._files.get_file(path, str(copied))
            verify(staged)
            if digest(staged) != wanted:
                raise ArtifactError(f"artifact {wanted} in {self._url} has another manifest than its name says")
            os.rename(staged, target)
        except VersionFolderError as error:
            raise ArtifactError(f"artifact {wanted} in {self._url} is damaged: {error.args[0]}") from error
        except OSError as error:
            raise ArtifactError(f"cannot copy artifact {wanted} to {target}: {error}") from error
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    def has(self, wanted: str) -> bool:
        """Whether a complete artifact of this digest is there."""
        return DIGEST.fullmatch(wanted) is not None and bool(self._files.exists(self._path(wanted, MANIFEST_JSON)))

    def digests(self) -> list[str]:
        """Every complete artifact."""
        if not self._files.exists(self._root):
            return []
        names = (path.rstrip("/").rpartition("/")[2] for path in self._files.ls(self._root, detail=False))
        return sorted(name for name in names if self.has(name))

    def delete(self, wanted: str) -> None:
        """Forget an artifact; one that is not there is no error."""
        if self.has(wanted):
            self._files.rm_file(self._path(wanted, MANIFEST_JSON))
        if DIGEST.fullmatch(wanted) and self._files.exists(self._path(wanted)):
            self._files.rm(self._path(wanted), recursive=True)

    def _path(self, *parts: str) -> str:
        return "/".join((self._root, *parts))


def artifact_store(settings: Settings) -> ArtifactStore:
    return ArtifactStore(settings.artifacts_url)
