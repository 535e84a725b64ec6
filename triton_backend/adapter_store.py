"""The adapters that lie beside a model's versions, ready for its slots: which exist, and their matrices.

    <model directory>/1/                          a version
                      adapters/<name>/            adapter.safetensors  adapter.json  manifest.json  (exporters.adapters)

``open`` is called for every request on the thread that submits it, ``read`` on the engine thread when an adapter goes
into a slot. An adapter may be added or replaced while the engine runs; a replaced one is another adapter.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from triton_backend import version_folder
from triton_backend.adapter_manager import AdapterRef
from triton_backend.errors import InvalidRequest, VersionFolderError

WEIGHTS, FACTS = "adapter.safetensors", "adapter.json"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
MAX_NAMES_SHOWN = 20


class AdapterStore:
    """Adapters of the version whose digest is ``version_digest``; empty for one that is not sealed yet, which takes
    any."""

    def __init__(self, folder: Path, version_digest: str) -> None:
        self._folder = folder
        self._version_digest = version_digest
        self._lock = threading.Lock()
        self._opened: dict[str, tuple[tuple[int, int, int], AdapterRef]] = {}

    def names(self) -> list[str]:
        if not self._folder.is_dir():
            return []
        found = (path.parent.name for path in self._folder.glob(f"*/{version_folder.MANIFEST_JSON}"))
        return sorted(name for name in found if NAME.fullmatch(name))

    def open(self, name: str) -> AdapterRef:
        """The adapter called ``name`` as it lies there now; raises InvalidRequest if there is none, or a bad one."""
        stamp = self._stamp(name) if NAME.fullmatch(name) else None
        if stamp is None:
            names = self.names()
            known = ", ".join(names[:MAX_NAMES_SHOWN]) + (", …" if len(names) > MAX_NAMES_SHOWN else "")
            raise InvalidRequest(f"adapter has value {name!r:.140}; this model has {known or 'no adapters'}")
        with self._lock:
            if name in self._opened and self._opened[name][0] == stamp:
                return self._opened[name][1]
        ref = self._verified(name)
        with self._lock:
            self._opened[name] = (stamp, ref)
        return ref

    def read(self, ref: AdapterRef) -> Mapping[str, np.ndarray]:
        """Graph input name → matrix; raises InvalidRequest if the adapter is not what was opened any more."""
        try:
            tensors: dict[str, np.ndarray] = load_file(self._folder / ref.name / WEIGHTS)
        except (OSError, SafetensorError, TypeError, AttributeError) as error:  # NumPy lacks some of its types
            raise InvalidRequest(f"adapter {ref.name!r} cannot be read: {error!r}; convert it again") from error
        if self._verified(ref.name) != ref:  # afterwards, so that what was read is what was verified
            raise InvalidRequest(f"adapter {ref.name!r} was replaced while the request waited; send it again")
        return tensors

    def _stamp(self, name: str) -> tuple[int, int, int] | None:
        """Changes with the adapter; None if there is none."""
        try:
            status = (self._folder / name / version_folder.MANIFEST_JSON).stat()
        except OSError:
            return None
        return (status.st_mtime_ns, status.st_size, status.st_ino)

    def _verified(self, name: str) -> AdapterRef:
        folder = self._folder / name
        try:
            if folder.is_symlink():
                raise VersionFolderError(f"{folder} is a link; an adapter is a plain folder")
            version_folder.verify(folder)
            facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
            base = str(facts["base"]["digest"])
            digest = version_folder.digest(folder)
        except (VersionFolderError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            reason = error.args[0] if isinstance(error, VersionFolderError) else repr(error)
            raise InvalidRequest(f"adapter {name!r} is damaged: {reason}; convert it again") from error
        if self._version_digest and base != self._version_digest:
            raise InvalidRequest(
                f"adapter {name!r} was made for version {base[:12]}…, but this is {self._version_digest[:12]}…; "
                "convert it for this version"
            )
        return AdapterRef(name, digest)
