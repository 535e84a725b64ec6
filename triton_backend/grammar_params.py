"""Which grammar a request wants its output to follow, from the names that OpenAI's, vLLM's and TensorRT-LLM's clients
send. Compiling it is grammars.py's. Standard library only.

    response_format         {"type": "json_schema", "json_schema": {"schema": {…}}}, {"type": "json_object"}
    structured_outputs      {"json": {…}}, {"regex": "…"}, {"choice": […]}, {"grammar": "…"}, {"json_object": true}
    guided_json …           the same, one name each
    guided_decoding_guide   with guided_decoding_guide_type: json, json_schema, regex, ebnf_grammar
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from triton_backend.errors import InvalidRequest
from triton_backend.parameter_kinds import Flag, require_encodable, shown

MAX_GRAMMAR_CHARS = 256 * 1024
MAX_CHOICES = 1024


@dataclass(frozen=True)
class GrammarSpec:
    """``kind``: json_schema, json_object, regex, choice (a JSON list of texts), lark or gbnf; ``text`` in that form."""

    kind: str
    text: str = ""


def grammar_from(values: Mapping[str, Any]) -> GrammarSpec | None:
    """The grammar among a request's parameters; raises InvalidRequest if one is malformed or there are two."""
    found = {name: spec for name, parse in GRAMMAR_PARAMETERS.items() if (spec := _parsed(name, parse, values))}
    if len(found) > 1:
        raise InvalidRequest(f"{' and '.join(found)} are both given; expected one grammar")
    return next(iter(found.values()), None)


def _parsed(name: str, parse: Callable[[str, Any, Mapping[str, Any]], GrammarSpec | None], values: Any) -> Any:
    value = values.get(name)
    is_typed = name == "guided_decoding_guide" and values.get("guided_decoding_guide_type") not in (None, "")
    if value in (None, "", {}) and not is_typed:
        return None
    spec = parse(name, value, values)
    if spec is not None and len(spec.text) > MAX_GRAMMAR_CHARS:
        raise InvalidRequest(f"{name} has {len(spec.text)} characters; expected at most {MAX_GRAMMAR_CHARS}")
    return spec


def _response_format(name: str, value: Any, values: Mapping[str, Any]) -> GrammarSpec | None:
    value = _object(name, value)
    kind = value.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return GrammarSpec("json_object")
    if kind == "json_schema":
        wrapper = _object(f"{name}.json_schema", value.get("json_schema"))
        return _schema(f"{name}.json_schema.schema", wrapper.get("schema"))
    raise InvalidRequest(f'{name}.type has value {shown(kind)}; expected "text", "json_object" or "json_schema"')


def _structured_outputs(name: str, value: Any, values: Mapping[str, Any]) -> GrammarSpec | None:
    given = {key: one for key, one in _object(name, value).items() if one not in (None, False)}
    kinds = {
        "json": _schema, "regex": _regex, "choice": _choice, "grammar": _grammar,
        "json_object": _json_object,
    }  # fmt: skip
    known = [key for key in given if key in kinds]
    if len(known) != 1:
        raise InvalidRequest(f"{name} has value {shown(value)}; expected exactly one of {', '.join(kinds)}")
    return kinds[known[0]](f"{name}.{known[0]}", given[known[0]])


def _guide(name: str, value: Any, values: Mapping[str, Any]) -> GrammarSpec | None:
    kind = values.get("guided_decoding_guide_type")
    if kind == "json":
        return GrammarSpec("json_object")
    kinds = {"json_schema": _schema, "regex": _regex, "ebnf_grammar": _grammar}
    if not isinstance(kind, str) or kind not in kinds:
        expected = ", ".join(["json", *kinds])
        raise InvalidRequest(f"guided_decoding_guide_type has value {shown(kind)}; expected one of {expected}")
    if value in (None, "", {}):
        raise InvalidRequest(f"{name} is missing; expected one, since guided_decoding_guide_type is {kind}")
    return kinds[kind](name, value)


def _schema(name: str, value: Any) -> GrammarSpec:
    if isinstance(value, str):
        text = _string(name, value)
    elif isinstance(value, (dict, bool)):
        try:
            text = json.dumps(value)
        except (RecursionError, ValueError) as error:
            raise InvalidRequest(f"{name} is nested too deeply ({error}); make it flatter") from None
    else:
        raise InvalidRequest(f"{name} has value {shown(value)}; expected a JSON schema")
    return GrammarSpec("json_schema", text)


def _json_object(name: str, value: Any) -> GrammarSpec | None:
    return GrammarSpec("json_object") if Flag().parse(name, value) else None


def _regex(name: str, value: Any) -> GrammarSpec:
    return GrammarSpec("regex", _string(name, value))


def _grammar(name: str, value: Any) -> GrammarSpec:
    """EBNF as llama.cpp writes it (``root ::= …``), or Lark."""
    text = _string(name, value)
    return GrammarSpec("gbnf" if "::=" in text else "lark", text)


def _choice(name: str, value: Any) -> GrammarSpec:
    is_valid = isinstance(value, (list, tuple)) and 0 < len(value) <= MAX_CHOICES
    if not is_valid or not all(isinstance(item, str) and item for item in value):
        raise InvalidRequest(f"{name} has value {shown(value)}; expected a list of 1 to {MAX_CHOICES} texts")
    for item in value:
        require_encodable(name, item)
    return GrammarSpec("choice", json.dumps(list(value)))


def _object(name: str, value: Any) -> Mapping[str, Any]:
    if isinstance(value, str):  # as one tensor or one form field
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value)
    if not isinstance(value, dict):
        raise InvalidRequest(f"{name} has value {shown(value)}; expected an object")
    return value


def _string(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise InvalidRequest(f"{name} has value {shown(value)}; expected a string")
    require_encodable(name, value)
    return value


GRAMMAR_PARAMETERS: dict[str, Callable[[str, Any, Mapping[str, Any]], GrammarSpec | None]] = {
    "response_format": _response_format,
    "structured_outputs": _structured_outputs,
    "guided_json": lambda name, value, _: _schema(name, value),
    "guided_regex": lambda name, value, _: _regex(name, value),
    "guided_choice": lambda name, value, _: _choice(name, value),
    "guided_grammar": lambda name, value, _: _grammar(name, value),
    "guided_decoding_guide": _guide,
}
