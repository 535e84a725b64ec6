"""``python -m triton_backend``: a line that is no request is refused, and nobody else is."""

from __future__ import annotations

import json

import pytest

from triton_backend.__main__ import parse_line
from triton_backend.errors import InvalidRequest

pytestmark = pytest.mark.integration


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"text": 5}, "text has value 5; expected a string"),
        ({"text": "\ud800"}, "text has half a character"),
        ({"input_ids": ["a"]}, r'input_ids has value \["a"\]; expected a list of token ids'),
        ({"input_ids": [-1]}, "input_ids has value"),
        ({"input_ids": "123"}, 'input_ids has value "123"'),
    ],
)
def test_a_prompt_of_another_type_is_refused(fields, said):
    with pytest.raises(InvalidRequest, match=said):
        parse_line(json.dumps({"id": "1", **fields}), {})


def test_a_prompt_is_text_or_tokens():
    assert parse_line('{"id": 1, "text": "a"}', {}).text == "a"
    assert parse_line('{"id": 1, "input_ids": [5, 6]}', {}).input_ids == (5, 6)
