"""Drafts come from the latest place where the longest end of the text occurred before."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triton_backend.prompt_lookup import MAX_NGRAM, MIN_NGRAM, draft

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ([1, 2, 3, 4, 1, 2], [3, 4, 1]),
        ([1, 2, 3, 9, 2, 3, 8, 1, 2, 3], [9, 2, 3]),
        ([1, 2, 7, 1, 2, 8, 1, 2], [8, 1, 2]),
        ([5, 5, 5, 5], [5]),
        ([1, 2, 3], []),
        ([1], []),
        ([], []),
        ([256, 1, 1 << 40, 256, 1], [1 << 40, 256, 1]),
    ],
)
def test_a_text_is_continued_as_before(text, expected):
    assert draft(text, 3) == expected


@given(text=st.lists(st.integers(0, 3), max_size=60), num_tokens=st.integers(1, 5))
def test_it_equals_the_obvious_search(text, num_tokens):
    def slow():
        for length in range(MAX_NGRAM, MIN_NGRAM - 1, -1):
            for start in range(len(text) - length - 1, -1, -1):
                if text[start : start + length] == text[-length:]:
                    return text[start + length : start + length + num_tokens]
        return []

    assert draft(text, num_tokens) == slow()
