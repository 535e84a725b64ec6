"""Every form in which a request may name a grammar, and every way to get one wrong."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triton_backend.errors import InvalidRequest
from triton_backend.grammar_params import GRAMMAR_PARAMETERS, MAX_CHOICES, GrammarSpec, grammar_from

pytestmark = pytest.mark.unit

SCHEMA = {"type": "integer"}
JSON_SCHEMA = GrammarSpec("json_schema", json.dumps(SCHEMA))
ANY_OBJECT = GrammarSpec("json_object")
LARK, GBNF = 'start: "a"', 'root ::= "a"'


def refused(values) -> str:
    with pytest.raises(InvalidRequest) as caught:
        grammar_from(values)
    return caught.value.args[0]


def guide(kind, text=None):
    return {"guided_decoding_guide": text, "guided_decoding_guide_type": kind}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, ANY_OBJECT),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}}, JSON_SCHEMA),
        ({"response_format": json.dumps({"type": "json_object"})}, ANY_OBJECT),
        ({"structured_outputs": {"json": SCHEMA}}, JSON_SCHEMA),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, JSON_SCHEMA),
        ({"structured_outputs": {"json_object": True}}, ANY_OBJECT),
        ({"structured_outputs": {"json_object": False, "regex": "a"}}, GrammarSpec("regex", "a")),
        ({"structured_outputs": {"json_object": "false"}}, None),
        ({"structured_outputs": {"choice": ["a", "b"]}}, GrammarSpec("choice", '["a", "b"]')),
        ({"structured_outputs": {"grammar": LARK}}, GrammarSpec("lark", LARK)),
        ({"structured_outputs": {"grammar": GBNF}}, GrammarSpec("gbnf", GBNF)),
        ({"guided_json": SCHEMA}, JSON_SCHEMA),
        ({"guided_json": json.dumps(SCHEMA)}, JSON_SCHEMA),
        ({"guided_regex": "a+"}, GrammarSpec("regex", "a+")),
        ({"guided_choice": ["a"]}, GrammarSpec("choice", '["a"]')),
        ({"guided_grammar": LARK}, GrammarSpec("lark", LARK)),
        ({"guided_grammar": GBNF}, GrammarSpec("gbnf", GBNF)),
        (guide("json"), ANY_OBJECT),
        (guide("json", ""), ANY_OBJECT),
        (guide("json_schema", json.dumps(SCHEMA)), JSON_SCHEMA),
        (guide("regex", "a+"), GrammarSpec("regex", "a+")),
        (guide("ebnf_grammar", GBNF), GrammarSpec("gbnf", GBNF)),
        (guide("", ""), None),
    ],
    ids=str,
)
def test_every_form_is_understood(values, expected):
    assert grammar_from(values) == expected


@pytest.mark.parametrize("name", GRAMMAR_PARAMETERS)
@pytest.mark.parametrize("nothing", [None, ""], ids=repr)
def test_an_empty_value_asks_for_nothing(name, nothing):
    assert grammar_from({name: nothing}) is None


ONE_EACH = {
    "response_format": {"type": "json_object"},
    "structured_outputs": {"regex": "a"},
    "guided_json": SCHEMA,
    "guided_regex": "a",
    "guided_choice": ["a"],
    "guided_grammar": LARK,
    "guided_decoding_guide": "a",
}


@pytest.mark.parametrize("second", list(ONE_EACH)[1:])
@pytest.mark.parametrize("first", list(ONE_EACH)[:-1])
def test_two_grammars_are_refused_by_both_names(first, second):
    if first == second:
        return
    values = {first: ONE_EACH[first], second: ONE_EACH[second], "guided_decoding_guide_type": None}
    if "guided_decoding_guide" in values:
        values["guided_decoding_guide_type"] = "regex"
    said = refused(values)
    assert first in said and second in said and said.endswith("are both given; expected one grammar")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"response_format": "{"}, 'response_format has value "{"; expected an object'),
        ({"response_format": {"type": []}}, "response_format.type has value []"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.schema has"),
        ({"structured_outputs": {"frobnicate": 1}}, "expected exactly one of json, regex, choice, grammar"),
        ({"structured_outputs": {"json_object": 5}}, "structured_outputs.json_object has value 5; expected true or"),
        ({"structured_outputs": {"regex": 5}}, "structured_outputs.regex has value 5; expected a string"),
        ({"guided_json": [1]}, "guided_json has value [1]; expected a JSON schema"),
        ({"guided_choice": "a"}, 'guided_choice has value "a"; expected a list'),
        ({"guided_choice": [""]}, 'guided_choice has value [""]'),
        ({"guided_choice": ["a"] * (MAX_CHOICES + 1)}, "expected a list of 1 to 1024 texts"),
        ({"guided_grammar": {"a": 1}}, "guided_grammar has value"),
        (guide([], "a"), "guided_decoding_guide_type has value []; expected one of json, json_schema"),
        (guide("xml", "a"), 'guided_decoding_guide_type has value "xml"'),
        (guide("regex"), "guided_decoding_guide is missing; expected one, since guided_decoding_guide_type is regex"),
        ({"guided_choice": ["x" * 300] * 1024}, "guided_choice has 311296 characters; expected at most 262144"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:40],
)  # fmt: skip
def test_a_malformed_one_is_refused_by_name(values, said):
    assert said in refused(values)


@pytest.mark.parametrize("depth", [500, 900, 990, 3000])
@pytest.mark.parametrize("name", GRAMMAR_PARAMETERS)
def test_lists_in_lists_in_lists_are_refused_or_kept(name, depth):
    value: object = 1
    for _ in range(depth):
        value = {"a": [value]}
    try:
        grammar_from({name: value, "guided_decoding_guide_type": None})
    except InvalidRequest as error:
        assert len(str(error)) < 400


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
KEYS = ["type", "json_schema", "schema", "json", "regex", "choice", "grammar", "json_object"]
KINDS = st.sampled_from(["json", "json_schema", "json_object", "regex", "ebnf_grammar", "text"])
NESTED = ANYTHING | st.dictionaries(st.sampled_from(KEYS), ANYTHING | KINDS, max_size=3)


@given(
    values=st.dictionaries(st.sampled_from([*GRAMMAR_PARAMETERS]), NESTED, max_size=2),
    kind=ANYTHING | KINDS,
)
@settings(max_examples=500, deadline=None)
def test_any_value_is_understood_or_refused(values, kind):
    try:
        found = grammar_from({**values, "guided_decoding_guide_type": kind})
    except InvalidRequest as error:
        assert len(str(error)) < 1000
    else:
        assert found is None or isinstance(found, GrammarSpec)
