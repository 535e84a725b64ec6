"""The artifact store: sealed folders under their digest, on a disk or in an object store (any fsspec URL).

    <url>/<sha256 of manifest.json>/model.onnx  model.json  …  manifest.json
          <sha256 of manifest.json>.<key>.sig    a signature of the manifest, by key (control_plane.signatures)

An artifact that has a manifest is complete: on a disk the whole folder appears in one rename (durable_folders),
elsewhere the manifest is written last and deleted first. What comes in is verified against its manifest, what goes
out against the manifest and the digest that was asked for. It knows files only.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from control_plane import durable_folders
from control_plane.errors import ControlPlaneError, NotFound
from control_plane.settings import Settings
from control_plane.signatures import Signer, TrustedKeys
from triton_backend.errors import VersionFolderError
from triton_backend.version_folder import MANIFEST_JSON, digest, verify

DIGEST = re.compile(r"[0-9a-f]{64}")
MIB = 1 << 20
VERSION, DAMAGED = "version", "damaged"


class ArtifactError(ControlPlaneError):
    """An artifact is damaged, or the store cannot be read or written."""

    status = 500
    code = "artifact_error"


@dataclass(frozen=True)
class Artifact:
    """``kind`` is ``version`` or ``checkpoint``, or ``damaged`` if its manifest cannot be read."""

    digest: str
    kind: str
    size_bytes: int


class ArtifactStore:
    """One store; may be used by many processes at once: what is whole in it never changes."""

    def __init__(self, url: str, signing_key: Path | None = None) -> None:
        self._url = url
        self._signing_key = signing_key
        filesystem, root = fsspec.core.url_to_fs(url)
        self._files: Any = filesystem
        self._root = root.rstrip("/")
        self._is_local = isinstance(filesystem, LocalFileSystem)

    def put(self, folder: Path, *, is_signed: bool = True, check: Callable[[], None] = lambda: None) -> str:
        """Store a sealed folder, sign it with the key, if any and ``is_signed``, and return its digest.

        One that is there already is kept if it is whole, and replaced if it is damaged. ``check`` is called every few
        MiB on a disk, before every file elsewhere; what it raises ends it, and what is half-made is no artifact.
        Raises ArtifactError, SigningError.
        """
        needed_bytes = 0
        try:
            manifest = verify(folder)
            found = digest(folder)
            needed_bytes = _size(manifest)
            signature = self._signature_of(folder, found) if is_signed else {}
            with self._only_writer():
                if not self._is_whole(found, check):
                    self._remove(found)
                    self._write(folder, [*manifest["files"], MANIFEST_JSON], found, check)
                for path, content in signature.items():
                    self._write_file(path, content)
            return found
        except VersionFolderError as error:
            raise ArtifactError(error.args[0]) from error
        except OSError as error:
            why = durable_folders.explain(error, Path(self._root) if self._is_local else None, needed_bytes)
            raise ArtifactError(f"cannot store {folder} in {self._url}: {why}") from error

    def get(self, wanted: str, target: Path) -> None:
        """Copy an artifact to ``target``, which must not exist; complete and verified, or not at all.

        Raises NotFound or ArtifactError.
        """
        if not self.has(wanted):
            raise NotFound(f"artifact {wanted} is not in {self._url}")
        # Several threads of a worker may fetch at once.
        staged = target.with_name(f".{target.name}.{threading.get_ident()}.fetched-{os.getpid()}")
        shutil.rmtree(staged, ignore_errors=True)
        needed_bytes = 0
        try:
            manifest = self._manifest(wanted)
            # What the manifest names, and nothing else that may lie there.
            names = sealed_names(manifest)
            needed_bytes = _size(json.loads(manifest))
            durable_folders.require_space(target.parent, needed_bytes)
            for name in names:
                copied = staged / name
                copied.parent.mkdir(parents=True, exist_ok=True)
                self._files.get_file(self._path(wanted, name), str(copied))
            (staged / MANIFEST_JSON).write_bytes(manifest)
            verify(staged)
            durable_folders.publish_folder(staged, target)
        except VersionFolderError as error:
            raise ArtifactError(f"artifact {wanted} in {self._url} is damaged: {error.args[0]}") from error
        except OSError as error:
            shutil.rmtree(staged, ignore_errors=True)
            why = durable_folders.explain(error, target.parent, needed_bytes)
            raise ArtifactError(f"cannot copy artifact {wanted} to {target}: {why}") from error
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    def has(self, wanted: str) -> bool:
        """Whether a complete artifact of this digest is there; that it is undamaged only ``get`` can say."""
        return DIGEST.fullmatch(wanted) is not None and bool(self._files.exists(self._path(wanted, MANIFEST_JSON)))

    def check(self, wanted: str, trusted: TrustedKeys) -> None:
        """Raises UntrustedArtifact unless a trusted key signed the artifact; NotFound or ArtifactError."""
        if not self.has(wanted):
            raise NotFound(f"artifact {wanted} is not in {self._url}")
        try:
            manifest = self._manifest(wanted)
            signatures = [self._files.cat_file(path) for path in self._signatures(wanted)]
        except OSError as error:
            raise ArtifactError(f"cannot read the signatures of {wanted} in {self._url}: {error}") from error
        trusted.check(wanted, manifest, signatures)

    def digests(self) -> list[str]:
        """Every complete artifact; raises ArtifactError if the store cannot be read."""
        try:
            if not self._files.exists(self._root):
                return []
            names = (path.rstrip("/").rpartition("/")[2] for path in self._files.ls(self._root, detail=False))
            return sorted(name for name in names if self.has(name))
        except OSError as error:
            raise ArtifactError(f"cannot read {self._url}: {error}") from error

    def describe(self, wanted: str) -> Artifact:
        """What an artifact's manifest says of it; raises NotFound."""
        try:
            manifest = json.loads(self._files.cat_file(self._path(wanted, MANIFEST_JSON)))
            return Artifact(wanted, str(manifest["source"].get("kind", VERSION)), _size(manifest))
        except FileNotFoundError:
            raise NotFound(f"artifact {wanted} is not in {self._url}") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            files = self._files.find(self._path(wanted), detail=True).values()
            return Artifact(wanted, DAMAGED, sum(file["size"] for file in files))

    def delete(self, wanted: str, is_needed: Callable[[str], bool] = lambda digest: False) -> bool:
        """Forget an artifact; one that is not there is no error. Returns whether it is gone.

        On a disk nobody stores it between the last question ``is_needed`` and its end.
        """
        if not DIGEST.fullmatch(wanted) or not self._files.exists(self._path(wanted)):
            return True
        with self._only_writer():
            if is_needed(wanted):
                return False
            self._remove(wanted)
            for path in self._signatures(wanted):
                self._files.rm_file(path)
            return True

    def _manifest(self, wanted: str) -> bytes:
        """Raises OSError, or ArtifactError if it is not the one that the digest is of."""
        manifest: bytes = self._files.cat_file(self._path(wanted, MANIFEST_JSON))
        if hashlib.sha256(manifest).hexdigest() != wanted:
            raise ArtifactError(f"artifact {wanted} in {self._url} has another manifest than its name says")
        return manifest

    def _signature_of(self, folder: Path, wanted: str) -> dict[str, bytes]:
        """The signature by its path; nothing without a key."""
        if self._signing_key is None:
            return {}
        signer = Signer(self._signing_key)
        signature = signer.sign(wanted, (folder / MANIFEST_JSON).read_bytes())
        return {self._path(f"{wanted}.{signer.key_id}.sig"): signature}

    def _signatures(self, wanted: str) -> list[str]:
        return sorted(self._files.glob(f"{glob.escape(self._path(wanted))}.*.sig"))

    def _write_file(self, path: str, content: bytes) -> None:
        if self._is_local:
            durable_folders.write_file(Path(path), content)
        else:
            self._files.pipe_file(path, content)

    def _remove(self, wanted: str) -> None:
        if self._is_local:
            durable_folders.remove_folder(Path(self._path(wanted)))
            return
        if self.has(wanted):
            self._files.rm_file(self._path(wanted, MANIFEST_JSON))
        if self._files.exists(self._path(wanted)):
            self._files.rm(self._path(wanted), recursive=True)

    def _write(self, folder: Path, names: Iterable[str], wanted: str, check: Callable[[], None]) -> None:
        """``names`` ends with the manifest."""
        if self._is_local:
            durable_folders.copy_folder(folder, list(names), Path(self._path(wanted)), check)
            return
        for name in names:
            check()
            target = self._path(wanted, name)
            self._files.makedirs(os.path.dirname(target), exist_ok=True)
            self._files.put_file(str(folder / name), target)

    def _is_whole(self, wanted: str, check: Callable[[], None]) -> bool:
        """Whether every byte of an artifact is there and right."""
        if not self.has(wanted):
            return False
        root = self._path(wanted)
        if self._sha256(f"{root}/{MANIFEST_JSON}", check) != wanted:
            return False
        listed = json.loads(self._files.cat_file(f"{root}/{MANIFEST_JSON}"))["files"]
        names = {path.removeprefix(f"{root}/") for path in self._files.find(root)}
        return names == {*listed, MANIFEST_JSON} and all(
            self._sha256(f"{root}/{name}", check) == file["sha256"] for name, file in listed.items()
        )

    def _sha256(self, path: str, check: Callable[[], None]) -> str:
        hasher = hashlib.sha256()
        with self._files.open(path, "rb") as stream:
            while chunk := stream.read(MIB):
                check()
                hasher.update(chunk)
        return hasher.hexdigest()

    def _only_writer(self) -> AbstractContextManager[None]:
        return durable_folders.only_writer(Path(self._root)) if self._is_local else nullcontext()

    def _path(self, *parts: str) -> str:
        return "/".join((self._root, *parts))


def artifact_store(settings: Settings) -> ArtifactStore:
    return ArtifactStore(settings.artifacts_url, settings.signing_key)


def sealed_names(manifest: bytes) -> list[str]:
    """Names of the files of a sealed folder; raises VersionFolderError for one that leads out of it."""
    try:
        names = [str(name) for name in json.loads(manifest)["files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise VersionFolderError(f"{MANIFEST_JSON} cannot be read: {error!r}") from error
    for name in names:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise VersionFolderError(f"{MANIFEST_JSON} names {name!r:.200}, which is outside of the folder")
    return names


def _size(manifest: dict[str, Any]) -> int:
    return sum(file["size_bytes"] for file in manifest["files"].values())
