"""Random secrets of one installation, one file each in ``LLMOS_HOME/secrets/``, readable by their owner only.

A secret is made by whoever asks for it first, in one atomic step, so every process of an installation sees the same
value; the API key of the ``llmos`` command is stored by the launcher. Nothing here is ever logged.
"""

from __future__ import annotations

import os
import secrets
import tempfile
from pathlib import Path

from control_plane.settings import Settings


def triton_admin_key(settings: Settings) -> str:
    """The key that opens Triton's control APIs (load, unload, …); only the control plane has it."""
    return secret(settings, "triton_admin_key")


def local_api_key(settings: Settings) -> str | None:
    """The API key of the ``llmos`` command of this installation, if it has one."""
    try:
        return _local_key_path(settings).read_text(encoding="ascii").strip() or None
    except OSError:
        return None


def store_local_api_key(settings: Settings, key: str) -> None:
    path = _local_key_path(settings)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    staged = _staged(path, key)
    os.rename(staged, path)


def _local_key_path(settings: Settings) -> Path:
    return settings.home / "secrets" / "api_key"


def secret(settings: Settings, name: str) -> str:
    """The secret called ``name``: 43 URL-safe characters, made on first use."""
    folder = settings.home / "secrets"
    path = folder / name
    if not path.exists():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _create(path)
    return path.read_text(encoding="ascii").strip()


def _create(path: Path) -> None:
    staged = _staged(path, secrets.token_urlsafe(32))
    try:
        # A link, unlike a rename, never replaces what another process made meanwhile.
        os.link(staged, path)
    except FileExistsError:
        pass
    finally:
        os.unlink(staged)


def _staged(path: Path, text: str) -> str:
    descriptor, staged = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # mode 0600
    with os.fdopen(descriptor, "w") as stream:
        stream.write(text + "\n")
        stream.flush()
        os.fsync(descriptor)
    return staged
