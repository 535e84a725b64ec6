"""Structured output: whatever is sampled obeys, and a hostile grammar costs its own request only."""

from __future__ import annotations

import json
import random
import re
import time

import pytest

from triton_backend.errors import InvalidRequest
from triton_backend.grammar_params import GrammarSpec

pytestmark = pytest.mark.integration

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["x", "y"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def obeys_schema(text: str) -> bool:
    value = json.loads(text)
    return (
        list(value) == ["name", "age", "tags"]
        and len(value["name"]) <= 8
        and 0 <= value["age"] <= 150
        and len(value["tags"]) <= 3
        and set(value["tags"]) <= {"x", "y"}
    )


FORMS = {
    "json_schema": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
        obeys_schema,
    ),
    "regex": (
        {"structured_outputs": {"regex": "[a-c]{2,6}(-[0-9]+)?!"}},
        re.compile("[a-c]{2,6}(-[0-9]+)?!").fullmatch,
    ),
    "choice": (
        {"guided_choice": ["red", "green", 'blue "sky" é 🙂']},
        {"red", "green", 'blue "sky" é 🙂'}.__contains__,
    ),
    "lark": (
        {"structured_outputs": {"grammar": 'start: "(" start ")" | /[0-9]{1,3}/'}},
        re.compile(r"\(*[0-9]{1,3}\)*").fullmatch,
    ),
    "gbnf": ({"guided_grammar": 'root ::= ("yes" | "no") " " [a-z]'}, re.compile("(yes|no) [a-z]").fullmatch),
    "trt": (
        {"guided_decoding_guide": '{"type": "boolean"}', "guided_decoding_guide_type": "json_schema"},
        {"true", "false"}.__contains__,
    ),
}
HOT = {"max_tokens": 200, "temperature": 2.0}


@pytest.mark.parametrize("form", FORMS)
def test_whatever_is_sampled_obeys_in_a_batch_with_others(client, form):
    params, obeys = FORMS[form]
    plain = [client.submit([5, i], max_tokens=40, ignore_eos=True) for i in range(3)]
    answers = [client.submit([7, i], seed=i, **HOT, **params) for i in range(12)]
    for answer in answers:
        output = answer.last().outputs[0]
        if output.finish_reason == "stop":
            assert obeys(output.text), output.text
    stopped = [client.ask([7, i], seed=i, **HOT, **params).outputs[0].finish_reason for i in range(6)]
    assert "stop" in stopped
    for i, answer in enumerate(plain):
        assert list(answer.last().outputs[0].token_ids) == client.ids([5, i], max_tokens=40, ignore_eos=True)


@pytest.mark.parametrize("form", ["regex", "choice", "gbnf", "trt"])
@pytest.mark.parametrize(
    "options",
    [{}, {"beam_width": 3, "n": 3}, {"ignore_eos": True}, {"n": 2}, {"beam_width": 2, "ignore_eos": True}],
    ids=str,
)
def test_greedy_beams_and_texts_without_an_end_token_obey_and_stop(client, form, options):
    params, obeys = FORMS[form]
    if options == {"beam_width": 3, "n": 3} and form == "trt":
        options = {"beam_width": 2, "n": 2}
    outputs = client.ask([7], max_tokens=60, **options, **params).outputs
    for output in outputs:
        assert obeys(output.text) or output.finish_reason == "length", output.text
    assert outputs[0].finish_reason == "stop" or form == "regex"  # whose digits may go on for ever


def test_a_choice_may_hold_any_character(client):
    for text in ('a"b', "a\\b", "a\nb", "a\tb", "a\x00b", "a\x1bb", "a\x7fb", "a\x85b", "a\u2028b", "a|b", "🙂"):
        output = client.ask([7], max_tokens=20, guided_choice=[text]).outputs[0]
        assert (output.text, output.finish_reason) == (text, "stop")


@pytest.mark.parametrize("form", ["regex", "choice", "gbnf", "trt"])
def test_a_streams_deltas_together_obey(client, form):
    params, obeys = FORMS[form]
    responses = list(client.submit([7], stream=True, seed=1, **HOT, **params))
    assert obeys("".join(output.text for response in responses for output in response.outputs))
    assert responses[-1].outputs[-1].finish_reason == "stop"


def test_any_json_object_is_an_object(client):
    found = [client.ask([9, i], seed=i, **HOT, response_format={"type": "json_object"}).outputs[0] for i in range(8)]
    ended = [output.text for output in found if output.finish_reason == "stop"]
    assert ended and all(isinstance(json.loads(text), dict) for text in ended)
    assert not any(re.search(r"\s{25}", text) for text in ended)


def test_masks_are_those_of_trying_every_token(client):
    compiler, tokenizer = client.engine._intake._grammars, client.engine._tokenizer
    state = compiler.compile(GrammarSpec("regex", "(im|fo)[a-z]{1,9}, ?x"))
    draw = random.Random(1)
    while not state.is_finished:
        allowed = state.allowed(tokenizer.vocab_size)
        tried = []
        for token_id in range(tokenizer.vocab_size):
            copy = state.copy()
            copy.accept(token_id)
            tried.append(copy.error is None)
        assert allowed.tolist() == tried
        state.accept(draw.choice([i for i, is_allowed in enumerate(allowed) if is_allowed and i]))


def nested(depth: int) -> str:
    return '{"type":"array","items":' * depth + '{"type":"string"}' + "}" * depth


BOMB = {f"a{i}": {"anyOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(200)} | {"a200": {"type": "string"}}
DEEP = 5000


def schema_chain(link: str) -> str:
    links = ",".join(f'"{i}":{link % (i + 1)}' for i in range(DEEP))
    return '{"$ref":"#/$defs/0","$defs":{%s,"%d":{"type":"string"}}}' % (links, DEEP)  # noqa: UP031


def rule_chain(first: str, rule: str) -> str:
    return "\n".join([first, *(rule.format(i, i + 1) for i in range(DEEP)), rule.replace("r{1}", '"x"').format(DEEP)])


HOSTILE = {
    "chain of references": {"guided_json": schema_chain('{"$ref":"#/$defs/%d"}')},
    "chain of arrays": {"guided_json": schema_chain('{"items":{"$ref":"#/$defs/%d"}}')},
    "chain of rules": {"guided_grammar": rule_chain("start: r0", 'r{0}: "a" r{1}')},
    "chain of gbnf": {"guided_grammar": rule_chain("root ::= r0", 'r{0} ::= "a" r{1}')},
    "doubling": {"guided_grammar": rule_chain("start: r0", "r{0}: r{1} r{1}")},
    "left": {"guided_grammar": 'start: start "a" | "b"'},
    "loop": {"guided_grammar": "start: start"},
    "file": {"guided_grammar": '%import /etc/passwd\nstart: "a"'},
    "brackets": {"guided_regex": "(" * 5000 + "a" + ")" * 5000},
    "gbnf brackets": {"guided_grammar": "root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000},
    "nothing": {"guided_regex": "[^\\s\\S]"},
    "look-around": {"guided_regex": "(?=a)b"},
    "enum": {"guided_json": {"enum": [f"value number {i}" for i in range(10_000)]}},
    "constant": {"guided_json": {"const": "a" * 200_000}},
    "more properties": {"guided_json": {"properties": {f"p{i}": {"type": "string"} for i in range(10_000)}}},
    "surrogate": {"guided_json": {"const": "\ud83d"}},
    "optional": {"guided_grammar": "start: " + '"a"? ' * 3000},
    "unclosed": {"guided_regex": "(("},
    "quantifiers": {"guided_regex": "((a{1,1000}){1,1000}){1,1000}b"},
    "backtracking": {"guided_regex": "(a|b)*a(a|b){2000}"},
    "properties": {"guided_json": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(5000)}}},
    "nested": {"guided_json": nested(5000)},
    "references": {"guided_json": {"$ref": "#/$defs/a0", "$defs": BOMB}},
    "itself": {"guided_json": {"$ref": "#"}},
    "remote": {"guided_json": {"$ref": "http://127.0.0.1:1/x.json"}},
    "keyword": {"guided_json": {"not": {"type": "string"}}},
    "product": {
        "guided_json": {
            "allOf": [
                {"anyOf": [{"properties": {f"x{i}{j}": {"type": "string"}}} for j in range(4)]} for i in range(12)
            ]
        }
    },
    "ambiguous": {"structured_outputs": {"grammar": 'start: a\na: a a | "x" | '}},
    "empty": {"structured_outputs": {"grammar": "start: nothing"}},
    "long": {"guided_regex": "a" * 300_000},
}
REFUSED = {
    "unclosed",
    "nested",
    "itself",
    "remote",
    "keyword",
    "product",
    "empty",
    "long",
    "loop",
    "file",
    "brackets",
    "chain of gbnf",
}
REFUSED |= {"gbnf brackets", "nothing", "look-around", "more properties", "surrogate"}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_grammar_is_refused_or_ends_soon_and_leaves_the_others_alone(client, name):
    other = client.submit([5], max_tokens=100, ignore_eos=True)
    started_s = time.monotonic()
    try:
        response = client.ask([7], max_tokens=30, temperature=1.0, seed=1, **HOSTILE[name])
        assert name not in REFUSED
        assert response.error is None or response.error.startswith("INVALID_ARG: the output's grammar cannot")
    except InvalidRequest as error:
        assert name in REFUSED, error
        assert re.search("grammar|characters", str(error))
    assert time.monotonic() - started_s < 10
    assert list(other.last().outputs[0].token_ids) == client.ids([5], max_tokens=100, ignore_eos=True)
