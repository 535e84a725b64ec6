"""The data of an evaluation, streamed: plain text, documents or pairs, one line in memory at a time.

    text.txt      one document, in pieces of whole lines
    texts.jsonl   {"text": "…"}                                a document a line
    pairs.jsonl   {"source": "…", "target": "…"}  or  {"prompt": "…", "completion": "…"}

A file is JSON lines if its name ends with .jsonl, .ndjson or .json. Whatever is wrong is said with its line number.
This module knows nothing of models.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from exporters.errors import InvalidData
from triton_backend.version_folder import sha256_of

PIECE_CHARS = 1 << 14
MAX_LINE_BYTES = 1 << 24
JSON_LINES = (".jsonl", ".ndjson", ".json")
PAIR_NAMES = (("source", "target"), ("prompt", "completion"))


@dataclass(frozen=True)
class Piece:
    """A part of a document; the last line break that fits ends it. ``place`` says where it comes from."""

    text: str
    place: str
    begins_document: bool


@dataclass(frozen=True)
class Pair:
    source: str
    target: str
    line: int
    place: str


class DataFile:
    """One data file; ``num_bytes_read`` tells how far the reading is. Raises InvalidData."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            what = "is not a file" if path.exists() else "does not exist"
            raise InvalidData(f"the data file {path} {what}; expected a text file or JSON lines")
        self.path = path
        self.size_bytes = path.stat().st_size
        self.num_bytes_read = 0

    def identity(self) -> dict[str, Any]:
        return {"path": str(self.path), "size_bytes": self.size_bytes, "sha256": sha256_of(self.path)}

    def pieces(self) -> Iterator[Piece]:
        """Every document in pieces of at most PIECE_CHARS characters, or two such where a line is long."""
        is_empty = True
        for place, blocks in self._documents():
            begins_document = True
            for text in _whole_lines(blocks):
                yield Piece(text, place, begins_document)
                begins_document = is_empty = False
        if is_empty:
            raise InvalidData(f'{self.path} has no text; expected some text, or lines such as {{"text": "…"}}')

    def pairs(self) -> Iterator[Pair]:
        is_empty = True
        for line, record in self._records():
            yield self._pair(line, record)
            is_empty = False
        if is_empty:
            raise InvalidData(f'{self.path} has no pairs; expected lines such as {{"source": "…", "target": "…"}}')

    def _documents(self) -> Iterator[tuple[str, Iterable[str]]]:
        if self.path.suffix not in JSON_LINES:
            yield str(self.path), self._text_blocks()
            return
        for line, record in self._records():
            text = _text_of(record, "text", self._place(line))
            yield self._place(line), (text[i : i + PIECE_CHARS] for i in range(0, len(text), PIECE_CHARS))

    def _text_blocks(self) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8-sig")()
        line = 1
        with self._open() as stream:
            while True:
                block = stream.read(PIECE_CHARS)
                self.num_bytes_read += len(block)
                try:
                    yield decoder.decode(block, final=not block)
                except UnicodeDecodeError as error:
                    raise self._no_utf8(line + error.object[: error.start].count(b"\n"), error) from None
                if not block:
                    return
                line += block.count(b"\n")

    def _records(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Number and object of every line that is not blank."""
        with self._open() as stream:
            number = 0
            while raw := stream.readline(MAX_LINE_BYTES + 1):
                number += 1
                self.num_bytes_read += len(raw)
                if len(raw) > MAX_LINE_BYTES:
                    raise InvalidData(
                        f"{self._place(number)} has more than {MAX_LINE_BYTES} bytes; expected one JSON object a line"
                    )
                if raw.strip():
                    yield number, self._record(number, raw)

    def _record(self, number: int, raw: bytes) -> dict[str, Any]:
        try:
            record = json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            raise self._no_utf8(number, error) from None
        except (ValueError, RecursionError) as error:
            raise InvalidData(f"{self._place(number)} is not JSON ({error}); expected one JSON object a line") from None
        if not isinstance(record, dict):
            raise InvalidData(f"{self._place(number)} is a JSON {type(record).__name__}; expected an object")
        return record

    def _pair(self, line: int, record: dict[str, Any]) -> Pair:
        place = self._place(line)
        for names in PAIR_NAMES:
            if any(name in record for name in names):
                source, target = (_text_of(record, name, place) for name in names)
                return Pair(source, target, line, place)
        found = ", ".join(map(repr, record)) or "nothing"
        raise InvalidData(f"{place} has {found:.200}; expected source and target, or prompt and completion")

    def _open(self) -> BinaryIO:
        try:
            return self.path.open("rb")
        except OSError as error:
            raise InvalidData(
                f"cannot read {self.path} ({error.strerror}); expected a text file or JSON lines"
            ) from error

    def _place(self, line: int) -> str:
        return f"{self.path}, line {line}"

    def _no_utf8(self, line: int, error: UnicodeDecodeError) -> InvalidData:
        byte = error.object[error.start]
        return InvalidData(f"{self._place(line)} is not UTF-8 (byte 0x{byte:02x}); expected text encoded as UTF-8")


def _whole_lines(blocks: Iterable[str]) -> Iterator[str]:
    """The same text in pieces that end with a line, unless a line is longer than a block."""
    held = ""
    for block in blocks:
        held += block
        end = held.rfind("\n") + 1
        if end == 0 and len(held) >= PIECE_CHARS:
            end = len(held)
        if end:
            yield held[:end]
            held = held[end:]
    if held:
        yield held


def _text_of(record: dict[str, Any], name: str, place: str) -> str:
    text = record.get(name)
    if not isinstance(text, str) or not text:
        shown = "no" if name not in record else f"{text!r:.80} as"
        raise InvalidData(f"{place} has {shown} {name}; expected a text that is not empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidData(
            f"{place} has half a surrogate pair in {name}, {text[error.start]!a}; expected Unicode text"
        ) from None
    return text
