"""``python -m exporters.fetch SOURCE OUT``: a checked, sealed copy of a checkpoint, with JSON-lines events on stdout.

SOURCE is a folder or the id of a model on the Hub. OUT gets what an export reads and nothing else: no pickles, no code,
no links. It appears whole or not at all; its manifest says ``"kind": "checkpoint"`` and where it came from.

{"event": "started", "source": …}
{"event": "step", "step": "check" | "copy", "done": 0, "total": 2}             a Hub model is downloaded to be checked
{"event": "finished", "folder": …, "digest": …, "size_bytes": …, "model_type": "llama"}

Exit codes: 0 fetched · 1 failed (the last event is ``error``) · 2 wrong usage.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from exporters import OUT_OF_SPACE
from exporters.__main__ import run_with_events
from exporters.checkpoint import SAFE_PATTERNS, UNUSED_PATTERNS, open_checkpoint
from exporters.errors import InvalidConfig, OutOfSpace
from exporters.events import EmitEvent
from exporters.version import staged
from triton_backend.version_folder import MANIFEST_JSON, read_manifest, seal

KIND = "checkpoint"


def fetch(source: str, out: Path, emit: EmitEvent) -> None:
    """Raises ExportError."""
    emit({"event": "started", "source": source})
    if out.exists():
        raise InvalidConfig(f"{out} exists already; expected the name of a new folder")
    emit({"event": "step", "step": "check", "done": 0, "total": 2})
    checkpoint = open_checkpoint(source)
    emit({"event": "step", "step": "copy", "done": 1, "total": 2})
    try:
        with staged(out, overwrite=False) as folder:
            for name in wanted_files(checkpoint.folder):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(checkpoint.folder / name, folder / name)
            digest = seal(folder, {"kind": KIND, "source": source}, {})
            size_bytes = sum(file["size_bytes"] for file in read_manifest(folder)["files"].values())
    except OSError as error:
        if error.errno not in OUT_OF_SPACE:
            raise
        raise OutOfSpace(f"cannot copy {source} to {out}: the disk is full ({error}); nothing was kept") from error
    found = {"folder": str(out), "digest": digest, "size_bytes": size_bytes, "model_type": checkpoint.model_type}
    emit({"event": "finished", **found})


def wanted_files(folder: Path) -> list[str]:
    """Names of what an export reads, by the patterns that a download from the Hub is limited to."""
    names = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file())
    return [name for name in names if name != MANIFEST_JSON and _fits(name, SAFE_PATTERNS) and not _is_unused(name)]


def _is_unused(name: str) -> bool:
    return _fits(name, UNUSED_PATTERNS)


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m exporters.fetch", description="Check, copy and seal a checkpoint.")
    parser.add_argument("source", metavar="SOURCE", help="checkpoint folder, or id of a model on the Hub")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write; it must not exist")
    options = parser.parse_args(arguments)

    def work(emit: EmitEvent) -> int:
        fetch(options.source, options.out, emit)
        return 0

    return run_with_events(work)


if __name__ == "__main__":
    sys.exit(main())
