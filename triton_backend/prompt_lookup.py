"""Drafts the next tokens of a text from the text itself: where its last few tokens occurred before, it may go on alike.

Summaries, edits and code repeat their prompts, so drafts are often right; they cost nothing to make and one run of the
graph to verify. Saxena 2023, "Prompt Lookup Decoding". Standard library only.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

MAX_NGRAM = 4
MIN_NGRAM = 2


def draft(token_ids: Sequence[int], num_tokens: int) -> list[int]:
    """At most ``num_tokens`` tokens that may follow ``token_ids``; empty if their end never occurred before.

    The longest end that occurred wins, and of its places the latest.
    """
    text = array("q", token_ids)
    for length in range(min(MAX_NGRAM, len(text) - 1), MIN_NGRAM - 1, -1):
        found = _last_occurrence(text, text[-length:])
        if found >= 0:
            return list(text[found + length : found + length + num_tokens])
    return []


def _last_occurrence(text: array[int], end: array[int]) -> int:
    """The last position before its own at which ``end``, the last tokens of ``text``, occurs; -1 if none."""
    data, size = text.tobytes(), text.itemsize
    limit = len(data) - size  # an occurrence that ends before the text does
    while (found := data.rfind(end.tobytes(), 0, limit)) >= 0:
        if found % size == 0:
            return found // size
        limit = found + len(end) * size - 1
    return -1
