"""Source and target texts for an encoder–decoder: from a JSON-lines file, or names of the standard library.

A file has one object a line, ``{"source": "…", "target": "…"}``. Without a file the task is to put the spaces back into
names: ``getfilesystemencoding`` → ``get file system encoding``, as every ``get_file_system_encoding`` in the sources of
this Python installation teaches. One pair in 15 is held out, chosen by its source, so that the same pair is always on
the same side. This module knows nothing of tokens or models.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from control_plane.training.corpus import HELD_OUT_ONE_IN, source_files
from control_plane.training.errors import CorpusMissing, InvalidData

MIN_WORDS, MAX_WORDS = 2, 4
MAX_NAME_CHARS = 28
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")


@dataclass(frozen=True)
class Pair:
    source: str
    target: str

    @property
    def is_held_out(self) -> bool:
        digest = hashlib.sha256(self.source.encode()).digest()
        return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


def read_pairs(path: Path) -> list[Pair]:
    """Every pair of a JSON-lines file, once; raises InvalidData that names the line."""
    pairs: dict[Pair, None] = {}
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    pairs[_pair_of(line, f"{path}, line {number}")] = None
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidData(f"cannot read {path} ({error}); expected a JSON-lines file in UTF-8") from error
    if not pairs:
        raise InvalidData(f'{path} has no pairs; expected lines such as {{"source": "…", "target": "…"}}')
    return list(pairs)


def _pair_of(line: str, place: str) -> Pair:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise InvalidData(f"{place} is not JSON ({error}); expected an object with source and target") from error
    if not isinstance(record, dict):
        raise InvalidData(f"{place} is a JSON {type(record).__name__}; expected an object with source and target")
    for name in ("source", "target"):
        if not isinstance(record.get(name), str) or not record[name]:
            raise InvalidData(f"{place} has {name} {record.get(name)!r}; expected a text that is not empty")
    return Pair(record["source"], record["target"])


def standard_library_pairs(on_progress: Callable[[int, int], None] = lambda done, total: None) -> list[Pair]:
    """Every name of two to four words once, in the order of the sources. Raises CorpusMissing.

    Where one string is written with different spaces in different places, the first one counts.
    """
    paths = source_files(Path(sysconfig.get_path("stdlib")))
    pairs: dict[str, Pair] = {}
    for done, path in enumerate(paths, 1):
        for name in _names(path):
            words = [word.lower() for part in name.split("_") for word in _WORD.findall(part)]
            source = "".join(words)
            is_whole = len(source) == len(name.replace("_", ""))  # digits and other letters are left out
            if is_whole and MIN_WORDS <= len(words) <= MAX_WORDS and len(source) <= MAX_NAME_CHARS:
                pairs.setdefault(source, Pair(source, " ".join(words)))
        on_progress(done, len(paths))
    if not pairs:
        raise CorpusMissing("found no names in the standard library; install Python with its sources, or pass --data")
    return list(pairs.values())


def _names(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError:  # some distributions keep templates among the sources
        return
    for node in ast.walk(tree):
        for field in ("id", "attr", "name", "arg"):
            if isinstance(name := getattr(node, field, None), str):
                yield name
