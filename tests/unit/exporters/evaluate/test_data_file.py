"""Data files of an evaluation: read line by line, and every fault named with its line."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from exporters.errors import InvalidData
from exporters.evaluate.data_file import PIECE_CHARS, DataFile

pytestmark = pytest.mark.unit


@pytest.fixture
def data(tmp_path: Path):
    def write(name: str, content: str | bytes) -> DataFile:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return DataFile(path)

    return write


def refused(found: Iterator[object], words: str) -> None:
    with pytest.raises(InvalidData, match=words):
        list(found)


def test_a_text_is_one_document_in_pieces_of_whole_lines(data):
    text = "".join(f"line {i}: größer, 東京 🙂\r\n" for i in range(3000)) + "the end"
    file = data("a.txt", text)
    pieces = list(file.pieces())
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.begins_document for piece in pieces] == [True] + [False] * (len(pieces) - 1)
    assert len(pieces) > 3 and all(piece.text.endswith("\n") for piece in pieces[:-1])
    assert file.num_bytes_read == file.size_bytes == len(text.encode())


@pytest.mark.parametrize("text", ["x" * 100_000, "é" * 50_000, "🙂", "\n\n", "a\n" + "y" * 40_000 + "\nb"])
def test_pieces_join_to_the_text_whatever_its_lines_are(data, text):
    pieces = [piece.text for piece in data("a.txt", text).pieces()]
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 2 * PIECE_CHARS


def test_every_line_of_json_is_a_document(data):
    file = data("a.jsonl", '\ufeff{"text": "one\\ntwo"}\n\n{"text": "three", "id": 3}')
    assert [(p.text, p.begins_document) for p in file.pieces()] == [("one\n", True), ("two", False), ("three", True)]
    assert [piece.place.rpartition(", ")[2] for piece in file.pieces()] == ["line 1", "line 1", "line 3"]


def test_pairs_have_either_pair_of_names(data):
    file = data("a.jsonl", '{"source": "a", "target": "b"}\n{"prompt": "c", "completion": "d", "id": 1}\n')
    assert [(p.source, p.target, p.line) for p in file.pairs()] == [("a", "b", 1), ("c", "d", 2)]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"{", r"line 2 is not JSON .*; expected one JSON object a line"),
        (b"[" * 50_000, r"line 2 is not JSON"),
        (b"[1]", r"line 2 is a JSON list; expected an object"),
        (b'{"text": "\xff"}', r"line 2 is not UTF-8 \(byte 0xff\)"),
        (b'{"text": 5}', r"line 2 has 5 as text; expected a text that is not empty"),
        (b'{"text": ""}', r"line 2 has '' as text"),
        (b'{"txt": "a"}', r"line 2 has no text"),
        (b'{"text": "\\ud83d"}', r"line 2 has half a surrogate pair in text, '\\ud83d'"),
    ],
)
def test_a_bad_document_is_named_with_its_line(data, line, words):
    refused(data("a.jsonl", b'{"text": "fine"}\n' + line + b"\n").pieces(), words)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"source": "a"}', r"line 2 has no target; expected a text"),
        ('{"source": "a", "target": null}', r"line 2 has None as target"),
        ('{"question": "a"}', r"line 2 has 'question'; expected source and target, or prompt and completion"),
        ("{}", r"line 2 has nothing; expected source and target"),
    ],
)
def test_a_bad_pair_is_named_with_its_line(data, line, words):
    refused(data("a.jsonl", '{"source": "a", "target": "b"}\n' + line).pairs(), words)


def test_bytes_that_are_no_text_are_named_with_their_line(data):
    refused(data("a.txt", b"one\ntwo\nthr\xc3\xc3ee").pieces(), r"a\.txt, line 3 is not UTF-8 \(byte 0xc3\)")
    long = ("é" * 20_000 + "\n").encode()
    refused(data("a.txt", long * 3 + b"\x80").pieces(), r"line 4 is not UTF-8 \(byte 0x80\)")
    refused(data("a.txt", "cut off é".encode()[:-1]).pieces(), r"line 1 is not UTF-8 \(byte 0xc3\)")


def test_nothing_to_read_is_an_error(data, tmp_path):
    refused(data("a.txt", "").pieces(), "has no text")
    refused(data("a.jsonl", "\n \n").pieces(), "has no text")
    refused(data("a.jsonl", "").pairs(), "has no pairs")
    with pytest.raises(InvalidData, match="is not a file"):
        DataFile(tmp_path)
    with pytest.raises(InvalidData, match=r"nowhere\.txt does not exist"):
        DataFile(tmp_path / "nowhere.txt")


def test_a_large_file_takes_little_memory(tmp_path):
    """64 MiB of holes, which read as NUL characters: a text without a line break, and JSON whose line never ends."""
    for name in ("a.txt", "a.jsonl"):
        with (tmp_path / name).open("wb") as stream:
            stream.truncate(64 << 20)
    tracemalloc.start()
    assert sum(len(piece.text) for piece in DataFile(tmp_path / "a.txt").pieces()) == 64 << 20
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    refused(DataFile(tmp_path / "a.jsonl").pieces(), r"line 1 has more than 16777216 bytes")
    assert tracemalloc.get_traced_memory()[1] < 48 << 20
    tracemalloc.stop()
