"""What the starter model reads: deterministic, without repeats, and English."""

from __future__ import annotations

import pytest

from control_plane.training.corpus import Document, normalise, standard_library_documents

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    return standard_library_documents()


def test_corpus_is_the_same_every_time_and_counts_its_files(documents: list[Document]) -> None:
    seen: list[tuple[int, int]] = []
    assert standard_library_documents(lambda done, total: seen.append((done, total))) == documents
    assert seen == [(done, len(seen)) for done in range(1, len(seen) + 1)]


def test_corpus_has_no_text_twice(documents: list[Document]) -> None:
    assert len({document.text for document in documents}) == len(documents)


def test_corpus_holds_the_language_reference_and_docstrings(documents: list[Document]) -> None:
    texts = {document.source: document.text for document in documents}
    assert 'The basic import statement (no "from" clause) is executed in two steps:' in texts["topics/import"]
    assert any(d.text.startswith("Configuration file parser.") for d in documents if d.source == "configparser.py")
    assert sum(len(document.text) for document in documents) > 400_000


def test_corpus_skips_tests_and_what_others_installed(documents: list[Document]) -> None:
    folders = {part for document in documents for part in document.source.split("/")[:-1]}
    assert folders.isdisjoint({"test", "tests", "idlelib", "site-packages"})


def test_a_source_is_held_out_whole(documents: list[Document]) -> None:
    held_out = {document.source for document in documents if document.is_held_out}
    trained = {document.source for document in documents if not document.is_held_out}
    assert held_out.isdisjoint(trained)
    assert 0.01 < len(held_out) / len(held_out | trained) < 0.1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The module’s own source code is “compiled”", 'The module\'s own source code is "compiled"'),
        ("Heading\n*******\n\nText", "Heading\n\nText"),
        ("Before\n\n>>> 1 + 1\n2\n\nAfter", "Before\n\nAfter"),
        ('Before\n\n   stmt ::= "x"\n\nAfter', "Before\n\nAfter"),
        (f"{'word ' * 12}end.  Then\nmore", f"{'word ' * 12}end. Then more"),
        (f"* {'word ' * 12}end\n  of item", f"* {'word ' * 12}end of item"),
        ("Short\nlines", "Short\nlines"),
        (f"{'word ' * 12}cross-\nreference", f"{'word ' * 12}cross-reference"),
        ("Before\n\n   x = f(1, y=[2])\n\nAfter", "Before\n\nAfter"),
        ("Before\n\nname    what it is for\n\nAfter", "Before\n\nAfter"),
        ("Before\n\n    indented", "Before\n\nindented"),
    ],
    ids=[
        "quotes",
        "underline",
        "session",
        "grammar",
        "paragraph",
        "list item",
        "short lines",
        "hyphen",
        "code",
        "table",
        "margin",
    ],
)
def test_normalise(text: str, expected: str) -> None:
    assert normalise(text) == expected
