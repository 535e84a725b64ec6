"""English documentation that every Python installation carries: the text the starter model learns from.

Two sources: the language reference in ``pydoc_data.topics``, and the docstrings of the standard library's modules, read
from their source with ``ast`` so that nothing is imported or run. The same Python version gives the same documents in
the same order. This module knows nothing of tokens or models.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from control_plane.training.errors import CorpusMissing

# What others installed, what only tests the library, and what repeats the topics.
SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo"}
    | {"pydoc_data", "site-packages", "dist-packages", "__pycache__"}
)
# One-line docstrings ("Return self.") teach little English and would be most of the documents.
MIN_DOCUMENT_CHARS = 800
# Letters, spaces and commas are over nine tenths of English; less of them is code, a table or a grammar.
MIN_PROSE_FRACTION = 0.9
# One source file or topic in 15 is held out whole, so that siblings of a held-out text are held out too.
HELD_OUT_ONE_IN = 15

_PLAIN_QUOTES = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "-", "\u00a0": " ", "\t": "    "})
_UNDERLINE = re.compile(r"^ *[*=~^#+\"-]{3,} *$", re.MULTILINE)
_COLUMN_GAP = re.compile(r"\S {3,}\S")
_SENTENCE_GAP = re.compile(r" {2,}")
_PROSE = re.compile(r"[A-Za-z ,.;'\-]")
_PARAGRAPH_BREAK = re.compile(r"\n\s*\n")
_LIST_MARKER = re.compile(r"(?:[*-]|\d+\.) ")
# A shorter line ends where its author wanted it to: a heading, a signature, verse.
_MIN_WRAPPED_LINE_CHARS = 45


@dataclass(frozen=True)
class Document:
    """One text; ``source`` names where it comes from: ``topics/import`` or ``json/decoder.py``."""

    source: str
    text: str

    @property
    def is_held_out(self) -> bool:
        digest = hashlib.sha256(self.source.encode()).digest()
        return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


def standard_library_documents(on_progress: Callable[[int, int], None] = lambda done, total: None) -> list[Document]:
    """Every text once, topics first; ``on_progress(done, total)`` counts source files. Raises CorpusMissing."""
    library = Path(sysconfig.get_path("stdlib"))
    sources = source_files(library)
    documents = {text: Document(source, text) for source, text in _topics()}
    for done, path in enumerate(sources, 1):
        for docstring in _docstrings(path):
            if len(text := normalise(docstring)) >= MIN_DOCUMENT_CHARS:
                documents.setdefault(text, Document(path.relative_to(library).as_posix(), text))
        on_progress(done, len(sources))
    if not documents:
        raise CorpusMissing(f"found no documentation in {library}; install Python with its standard library as source")
    return list(documents.values())


def normalise(text: str) -> str:
    """Plain quotes, no heading underlines, no code or tables, and every paragraph of prose on one line."""
    text = _UNDERLINE.sub("", text.translate(_PLAIN_QUOTES))
    paragraphs = (textwrap.dedent(paragraph).strip() for paragraph in _PARAGRAPH_BREAK.split(text))
    return "\n\n".join(_unwrap(paragraph) for paragraph in paragraphs if paragraph and _is_prose(paragraph))


def _is_prose(paragraph: str) -> bool:
    is_laid_out = ">>>" in paragraph or _COLUMN_GAP.search(paragraph)
    return not is_laid_out and len(_PROSE.findall(paragraph)) >= MIN_PROSE_FRACTION * len(paragraph)


def _unwrap(paragraph: str) -> str:
    """Join hard-wrapped lines; a new item of a list, and what follows a short line, begins a line of its own."""
    lines: list[str] = []
    previous = ""
    for line in paragraph.splitlines():
        text = _SENTENCE_GAP.sub(" ", line.strip())
        if len(previous) < _MIN_WRAPPED_LINE_CHARS or _LIST_MARKER.match(text):
            lines.append(text)
        else:
            lines[-1] += text if lines[-1].endswith("-") else f" {text}"
        previous = line
    return "\n".join(lines)


def _topics() -> Iterator[tuple[str, str]]:
    """(source, text) of the language reference; a Python built without ``pydoc_data`` has none."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    for name in sorted(topics):
        yield f"topics/{name}", normalise(topics[name])


def source_files(library: Path) -> list[Path]:
    paths = (path for path in library.rglob("*.py") if SKIPPED_FOLDERS.isdisjoint(path.relative_to(library).parts))
    return sorted(paths, key=lambda path: path.relative_to(library).as_posix())


def _docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError:  # some distributions keep templates among the sources
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""
