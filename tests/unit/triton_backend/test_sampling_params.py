"""What a request may ask: contradictions, other servers' names, grammars, and values of any size and type."""

from __future__ import annotations

import json
import math
import time

import jsonschema_rs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triton_backend.errors import InvalidRequest
from triton_backend.grammar_params import GRAMMAR_PARAMETERS, GrammarSpec
from triton_backend.protocol import (
    MAX_PARAMETERS_BYTES,
    GenerateResponse,
    SequenceOutput,
    TokenLogprob,
    response_tensors,
)
from triton_backend.protocol import parse_request as parse_tensors
from triton_backend.sampling_params import ALIASES, FIELDS, MIN_TEMPERATURE, OTHER_PARAMETERS, SamplingParams

pytestmark = pytest.mark.unit

parse = SamplingParams.from_mapping


def refused(values, defaults=None) -> str:
    with pytest.raises(InvalidRequest) as caught:
        parse(values, defaults)
    return caught.value.args[0]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"beam_width": 4, "top_p": 0.9}, "top_p has value 0.9 and beam_width has value 4, but beams do not sample"),
        ({"beam_width": 4, "top_k": 5}, "top_k has value 5 and beam_width"),
        ({"beam_width": 4, "temperature": 0.7}, "temperature has value 0.7 and beam_width"),
        ({"beam_width": 4, "min_p": 0.1}, "min_p has value 0.1 and beam_width"),
        ({"beam_width": 4, "typical_p": 0.5}, "typical_p has value 0.5 and beam_width"),
        ({"beam_width": 2, "n": 3}, "n has value 3; expected at most beam_width = 2"),
        ({"beam_width": 2, "logprobs": 1}, "logprobs has value 1; expected 0, since beam_width = 2"),
        ({"beam_width": 2, "best_of": 2}, "best_of has value 2; expected nothing, since beam_width = 2"),
        ({"beam_width": 4, "num_beam_groups": 3}, "num_beam_groups has value 3; expected a divisor of beam_width = 4"),
        ({"beam_width": 4, "num_beam_groups": 2}, "diversity_penalty has value 0.0; expected a number above 0"),
        ({"beam_width": 4, "diversity_penalty": 1}, "diversity_penalty has value 1.0; expected 0, unless"),
        (
            {"beam_width": 4, "num_beam_groups": 2, "diversity_penalty": 1, "do_sample": True},
            "num_beam_groups has value 2; expected 1, since do_sample is true",
        ),
        ({"best_of": 1, "n": 2}, "best_of has value 1; expected at least n = 2"),
        ({"min_tokens": 9, "max_tokens": 3}, "min_tokens has value 9; expected at most max_tokens = 3"),
        ({"do_sample": True, "temperature": 0}, "do_sample has value true; expected false, or a temperature above 0"),
        (
            {"guided_regex": "a", "response_format": {"type": "json_object"}},
            "response_format and guided_regex are both",
        ),
        ({"beam_width": "four"}, 'beam_width has value "four"; expected a whole number from 0 to 128'),
        ({"early_stopping": "sometimes"}, 'early_stopping has value "sometimes"; expected true, false or "never"'),
        ({"logit_bias": {"x": 1}}, 'a token id of logit_bias has value "x"'),
        ({"logit_bias": [[1, 2, 3]]}, "logit_bias has an entry [1, 2, 3]"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens has value 0; expected -1, or a whole number ≥ 1"),
        ({"length_penalty": 11}, "length_penalty has value 11; expected a number from -10 to 10"),
        ({"sequence_bias": {"1": 2}}, 'sequence_bias has value {"1": 2}, but this engine does not support it'),
    ],
)
def test_contradictions_and_bad_values_are_refused_by_name(values, said):
    assert said in refused(values)


def test_beams_do_not_sample_unless_told():
    plain = parse({"beam_width": 4, "temperature": 1}, {"temperature": 0.6, "top_p": 0.9, "top_k": 50})
    assert (plain.is_greedy, plain.top_p, plain.top_k) == (True, 1.0, 0)
    drawn = parse({"beam_width": 4, "do_sample": True, "top_p": 0.5}, {"temperature": 0.6})
    assert (drawn.temperature, drawn.top_p) == (0.6, 0.5)
    assert parse({"do_sample": False, "temperature": 0.9}).is_greedy


@pytest.mark.parametrize("temperature", [1e-40, 5e-324, "1e-9", 9.9e-6])
def test_a_temperature_that_logits_cannot_be_divided_by_counts_as_the_smallest(temperature):
    drawn = parse({"beam_width": 4, "do_sample": True, "temperature": temperature})
    assert drawn.temperature == parse({"temperature": temperature}).temperature == MIN_TEMPERATURE
    assert parse({"temperature": 0}).is_greedy


def test_a_models_own_beams_are_for_requests_that_ask_for_nothing_else():
    defaults = {"beam_width": 4, "length_penalty": 2.0, "early_stopping": True}
    assert parse({}, defaults).beam_width == 4
    assert parse({"n": 3}, defaults).beam_width == 4
    for asked in ({"temperature": 0}, {"top_k": 3}, {"n": 5}, {"best_of": 2}, {"do_sample": True}, {"logprobs": 1}):
        assert parse(asked, defaults).beam_width == 1, asked
    assert parse({"beam_width": 2}, defaults).beam_width == 2


@pytest.mark.parametrize("no_beams", [{"beam_width": 0}, {"beam_width": 1}, {"use_beam_search": False}], ids=str)
def test_a_request_without_beams_has_none_whatever_the_model_would_do(no_beams):
    assert parse(no_beams, {"beam_width": 4}).beam_width == 1
    assert parse({"use_beam_search": None}, {"beam_width": 4}).beam_width == 4


@pytest.mark.parametrize(("alias", "name"), ALIASES.items())
def test_an_alias_is_its_field(alias, name):
    value = {"diversity_penalty": 1, "adapter": "legal", "stop": ["x"], "stop_token_ids": [3]}.get(name, 2)
    also = {"beam_width": 4, "num_beam_groups": 2} if name == "diversity_penalty" else {}
    params = parse({alias: value, **also})
    assert params == parse({name: value, **also})
    assert getattr(params, name) != getattr(SamplingParams(), name)


def test_other_servers_names_mean_the_same():
    assert parse({"use_beam_search": True, "n": 4}).beam_width == 4
    assert parse({"use_beam_search": "false", "n": 4}).beam_width == 1
    assert parse({"use_beam_search": True}, {"temperature": 0.7}).is_greedy
    assert parse({"beam_width": 4, "top_k": 1}).is_greedy
    assert parse({"beam_width": 0}).beam_width == parse({"num_beams": 1}).beam_width == 1
    assert parse({"lora_name": "legal"}).adapter == "legal" and parse({"lora_name": ""}).adapter is None
    assert parse({"logit_bias": {"7": -1, "3": "2.5"}}).logit_bias == ((3, 2.5), (7, -1.0))
    assert parse({"logit_bias": [[7, -1]]}).logit_bias == ((7, -1.0),)
    assert parse({"allowed_token_ids": []}).allowed_token_ids is None


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, GrammarSpec("json_object")),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, GrammarSpec("json_schema", "{}")),
        ({"structured_outputs": {"regex": "a+", "json": None}}, GrammarSpec("regex", "a+")),
        ({"structured_outputs": '{"choice": ["a", "b"]}'}, GrammarSpec("choice", '["a", "b"]')),
        ({"structured_outputs": {"grammar": "start: /a/"}}, GrammarSpec("lark", "start: /a/")),
        ({"guided_grammar": 'root ::= "a"'}, GrammarSpec("gbnf", 'root ::= "a"')),
        ({"guided_json": '{"a": 1}'}, GrammarSpec("json_schema", '{"a": 1}')),
        ({"guided_decoding_guide": "a+", "guided_decoding_guide_type": "regex"}, GrammarSpec("regex", "a+")),
    ],
)  # fmt: skip
def test_every_form_of_a_grammar_is_understood(values, expected):
    assert parse(values).grammar == expected


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"response_format": {"type": "xml"}}, 'response_format.type has value "xml"'),
        ({"response_format": 5}, "response_format has value 5; expected an object"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema has value null"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "expected exactly one of json, regex, choice"),
        ({"guided_choice": []}, "guided_choice has value []; expected a list of 1 to 1024 texts"),
        ({"guided_choice": ["a", 5]}, "guided_choice has value"),
        ({"guided_regex": 5}, "guided_regex has value 5; expected a string"),
        ({"guided_regex": "a" * 300_000}, "guided_regex has 300000 characters; expected at most 262144"),
        (
            {"guided_decoding_guide": "a"},
            "guided_decoding_guide_type has value null; expected one of json, json_schema",
        ),
    ],
)
def test_a_malformed_grammar_is_refused_by_name(values, said):
    assert said in refused(values)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"stop": ["x"] * 10**5}, "stop has 100000 entries; expected at most 64"),
        ({"bad_words": ["x"] * 10**5}, "bad_words has 100000 entries; expected at most 256"),
        ({"logit_bias": {str(i): 1 for i in range(10**6)}}, "logit_bias has 1000000 entries; expected at most 4096"),
        ({"allowed_token_ids": list(range(10**6))}, "allowed_token_ids has 1000000 entries; expected at most 65536"),
        ({"n": 16384}, "n has value 16384; expected a whole number from 1 to 128"),
        ({"guided_choice": ["x"] * 10**5}, "guided_choice has value list of 100000 elements"),
        ({"seed": "9" * 10**6}, "seed has value str of 1000000 elements"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_huge_values_are_refused_at_once(values, said):
    started_s = time.monotonic()
    assert said in refused(values)
    assert time.monotonic() - started_s < 2


def test_more_parameters_than_anybody_needs_are_refused_unread():
    with pytest.raises(InvalidRequest, match="sampling_parameters has 5000000 bytes; expected at most"):
        parse_tensors("r", {"text_input": [b"x"], "sampling_parameters": [b" " * 5_000_000]})
    assert MAX_PARAMETERS_BYTES < 5_000_000


@pytest.mark.parametrize("name", ["stop", "bad_words", "adapter", "guided_regex", "guided_choice", "guided_grammar"])
def test_half_a_character_is_refused_with_its_place(name):
    value = ["ab\ud83d"] if name in ("stop", "bad_words", "guided_choice") else "ab\ud83d"
    assert f"{name} has half a character (\\ud83d) at position 2" in refused({name: value})


STRANGE = [True, "x", [True], [None], {"a": {}}, [[1, 2, 3]], math.nan, math.inf, -math.inf, "\ud83d", 10**4000]
STRANGE.append(10**5000)  # which Python does not write out


@pytest.mark.parametrize("name", FIELDS)
def test_a_value_of_another_type_is_refused_by_name_in_one_line(name):
    num_refused = 0
    for value in STRANGE:
        try:
            parse({name: value})
        except InvalidRequest as error:
            num_refused += 1
            said = error.args[0]
            assert name in said and len(said) < 300 and "\n" not in said
    assert num_refused >= len(STRANGE) - 2, "each kind takes at most two of these"


def test_the_name_of_a_biased_token_does_not_make_an_error_long():
    assert len(refused({"logit_bias": {"0" * 4000 + "7": "x"}})) < 200


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


@given(values=st.dictionaries(st.sampled_from(sorted({*FIELDS, *ALIASES, *OTHER_PARAMETERS})), JSON, max_size=4))
@settings(max_examples=500, deadline=None)
def test_any_value_of_any_parameter_is_understood_or_refused(values):
    try:
        params = parse(values)
    except InvalidRequest as error:
        assert str(error).startswith("INVALID_ARG: ") and len(str(error)) < 1000
    else:
        assert hash(params) == hash(parse(values)), "what crosses a thread is frozen"


def test_which_of_several_candidates_are_best_is_known_at_the_end_only():
    with pytest.raises(InvalidRequest, match="best_of has value 3 and stream is true"):
        parse_tensors("r", {"text_input": [b"x"], "stream": [True], "sampling_parameters": [b'{"best_of": 3}']})


def test_scores_and_log_probabilities_of_the_prompt_have_their_tensors():
    request = parse_tensors("r", {"text_input": [b"x"], "beam_width": [2], "return_sequence_scores": [True]})
    token = (TokenLogprob(5, -0.5, 1, "a"),)
    outputs = (SequenceOutput(0, "a", score=-0.25),)
    tensors = response_tensors(request, GenerateResponse("r", outputs, prompt_logprobs=(None, token)))
    assert tensors["sequence_scores"] == [-0.25]
    expected = [None, {"5": {"logprob": -0.5, "rank": 1, "decoded_token": "a"}}]
    assert json.loads(tensors["prompt_logprobs"][0]) == expected


def test_every_grammar_parameter_is_one_that_a_request_may_name():
    assert set(GRAMMAR_PARAMETERS) <= set(OTHER_PARAMETERS)


PLAIN = [0, 1, -1, 5, 0.5, 1.0, -3.5, 1e300, 2**31, 2**70, True, False, "never", "a", "a" * 300, "12", None]
NESTED = [[], [1], [-1], [True], ["a"], ["a"] * 300, [[1, 2.0]], {}, {"1": 2}, {"x": 1}, {"1": 101}, {"9" * 12: 1}]


@pytest.mark.parametrize("name", FIELDS)
def test_what_the_schema_of_a_parameter_allows_is_accepted(name):
    kind = FIELDS[name]
    validator = jsonschema_rs.Draft202012Validator(kind.schema())
    allowed = [value for value in PLAIN + NESTED if validator.is_valid(value)]
    assert allowed
    for value in allowed:
        kind.parse(name, value)


@pytest.mark.parametrize("name", FIELDS)
def test_plain_values_that_the_schema_of_a_parameter_forbids_are_refused(name):
    kind = FIELDS[name]
    validator = jsonschema_rs.Draft202012Validator(kind.schema())
    for value in (-(2**80), 2**80, [[[1]]], {"x": 1}):
        if not validator.is_valid(value):
            with pytest.raises(InvalidRequest):
                kind.parse(name, value)
