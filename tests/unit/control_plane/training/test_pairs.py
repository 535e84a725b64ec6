"""Pairs come from a file that says what is wrong with it, or from the names in the standard library."""

from __future__ import annotations

from pathlib import Path

import pytest

from control_plane.training.errors import InvalidData
from control_plane.training.pairs import Pair, read_pairs, standard_library_pairs

pytestmark = pytest.mark.unit


def test_every_line_is_a_pair_and_repeated_ones_count_once(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"source": "a", "target": "b"}\n\n{"source": "ü", "target": "c", "id": 3}\n' * 2, encoding="utf-8")
    assert read_pairs(path) == [Pair("a", "b"), Pair("ü", "c")]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no pairs"),
        ('{"source": "a", "target": "b"}\nnonsense', "line 2 is not JSON"),
        ("[1]", "line 1 is a JSON list; expected an object with source and target"),
        ('{"source": "a"}', "line 1 has target None; expected a text that is not empty"),
        ('{"source": "", "target": "b"}', "line 1 has source ''; expected a text that is not empty"),
        ('{"source": ["a"], "target": "b"}', r"line 1 has source \['a'\]; expected a text"),
    ],
)
def test_a_line_that_is_no_pair_is_named(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(text)
    with pytest.raises(InvalidData, match=said):
        read_pairs(path)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidData, match=r"cannot read .*missing\.jsonl"):
        read_pairs(tmp_path / "missing.jsonl")
    (tmp_path / "latin1.jsonl").write_bytes(b'{"source": "\xfc", "target": "u"}')
    with pytest.raises(InvalidData, match=r"latin1\.jsonl .*expected a JSON-lines file in UTF-8"):
        read_pairs(tmp_path / "latin1.jsonl")


def test_names_of_the_standard_library_lose_their_spaces() -> None:
    pairs = standard_library_pairs()
    assert len(pairs) > 3000
    assert all(pair.target.replace(" ", "") == pair.source and " " in pair.target for pair in pairs)
    assert Pair("getdata", "get data") in pairs
    assert len({pair.source for pair in pairs}) == len(pairs)
    held_out = [pair for pair in pairs if pair.is_held_out]
    assert 0.04 < len(held_out) / len(pairs) < 0.1
