"""Folders on a disk that appear whole or not at all, whatever happens: a kill, a full disk, a power cut.

    copy to .NAME.staged ─► fsync every file and folder of it ─► rename to NAME ─► fsync the parent

It knows nothing of what the files mean.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

MIB = 1 << 20
CHUNK_BYTES = 4 * MIB
OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def copy_folder(source: Path, names: Sequence[str], target: Path, check: Callable[[], None] = lambda: None) -> None:
    """Copy the files ``names`` of ``source`` to ``target``, which must not exist. Raises OSError and leaves nothing.

    ``check`` is called every few MiB; what it raises ends the copy, which leaves nothing either.
    """
    staged = target.with_name(f".{target.name}.staged")
    try:
        copy_files(source, names, staged, check)
        publish_folder(staged, target)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def copy_files(source: Path, names: Sequence[str], target: Path, check: Callable[[], None] = lambda: None) -> None:
    """Copy the files ``names`` of ``source`` into ``target``, calling ``check`` every few MiB. Raises OSError."""
    require_space(target.parent, sum((source / name).stat().st_size for name in names))
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        with (source / name).open("rb") as original, (target / name).open("wb") as copy:
            while chunk := original.read(CHUNK_BYTES):
                check()
                copy.write(chunk)


def publish_folder(staged: Path, target: Path) -> None:
    """Give a finished folder its name; both lie on one disk."""
    _sync_all(staged)
    os.rename(staged, target)
    sync(target.parent)


def replace_folder(staged: Path, target: Path) -> None:
    """As ``publish_folder``; a folder that has the name is gone before, for the moment between two renames."""
    _sync_all(staged)
    removed = target.with_name(f".{target.name}.removed")
    if target.exists():
        os.rename(target, removed)
    os.rename(staged, target)
    sync(target.parent)
    _remove(removed)


def write_file(path: Path, content: bytes) -> None:
    """Whole or not at all; what was there is replaced."""
    staged = path.with_name(f".{path.name}.partial")
    staged.write_bytes(content)
    sync(staged)
    os.rename(staged, path)
    sync(path.parent)


def remove_folder(folder: Path) -> None:
    """It is gone at once; its bytes follow. One that is not there is no error."""
    if folder.exists():
        removed = folder.with_name(f".{folder.name}.removed")
        _remove(removed)
        os.rename(folder, removed)
        sync(folder.parent)
        _remove(removed)


@contextmanager
def only_writer(root: Path) -> Iterator[None]:
    """Wait until no other process writes below ``root``, and remove what one that was killed left half-made."""
    made = [folder for folder in (root, *root.parents) if not folder.exists()]
    root.mkdir(parents=True, exist_ok=True)
    for folder in made:
        sync(folder.parent)
    with (root / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left in [*root.glob(".*.staged"), *root.glob(".*.removed")]:
            _remove(left)
        yield


def require_space(folder: Path, needed_bytes: int) -> None:
    """Raises OSError before a single byte is written in vain."""
    if free_bytes(folder) < needed_bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


def free_bytes(folder: Path) -> int:
    """What the disk of ``folder``, which need not exist yet, has free."""
    return shutil.disk_usage(next(parent for parent in (folder, *folder.parents) if parent.exists())).free


def explain(error: OSError, folder: Path | None, needed_bytes: int) -> str:
    """What failed; where there was no room, also how much is needed in ``folder``, None if that is on no disk."""
    if error.errno not in OUT_OF_SPACE:
        return str(error)
    free = "" if folder is None else f", {free_bytes(folder) / MIB:.1f} MiB are free there"
    return f"{error}; it needs {needed_bytes / MIB:.1f} MiB{free}; nothing was kept: free some space and try again"


def sync(path: Path) -> None:
    """Returns when a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """Whatever it is: of a link, what it leads to stays."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def _sync_all(folder: Path) -> None:
    for inner, _, files in os.walk(folder):
        for name in files:
            sync(Path(inner, name))
        sync(Path(inner))
