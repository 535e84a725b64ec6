"""The kinds of values that sampling parameters have: each parses what a client sent, or says what it expected.

Numbers may be strings, as vLLM's clients send them; every list is bounded, and a bad value is refused before it costs
anything. ``schema`` is the JSON Schema of a value in its plain form. Standard library only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from triton_backend.errors import InvalidRequest

MAX_STOP_STRINGS = 64
MAX_STRING_CHARS = 256
MAX_TOKEN_IDS = 65_536
MAX_BIASES = 4096
LARGE = 2**31 - 1


@dataclass(frozen=True)
class Number:
    """A whole number or a float within [low, high]; also as a string."""

    kind: type
    low: float
    high: float

    def parse(self, name: str, value: Any) -> int | float:
        number = self._convert(value)
        if number is None or not self.low <= number <= self.high:
            raise InvalidRequest(f"{name} has value {shown(value)}; expected {self}")
        return number

    def _convert(self, value: Any) -> int | float | None:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            return None
        try:
            if self.kind is int:
                is_whole = not isinstance(value, float) or value.is_integer()
                return int(value) if is_whole else None
            number = float(value)
        except (ValueError, OverflowError):
            return None
        return number if math.isfinite(number) else None

    def __str__(self) -> str:
        noun = "a whole number" if self.kind is int else "a number"
        return f"{noun} from {self.low:g} to {self.high:g}" if self.high < LARGE else f"{noun} ≥ {self.low:g}"

    def schema(self) -> dict[str, Any]:
        kind = "integer" if self.kind is int else "number"
        return {"type": kind, "minimum": self.low, "maximum": self.high}


@dataclass(frozen=True)
class Flag:
    """true or false; the strings "true" and "false" are accepted. ``also`` names one more value."""

    also: str | None = None

    def parse(self, name: str, value: Any) -> bool | str:
        if self.also is not None and value == self.also:
            return self.also
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        if not isinstance(value, bool):
            raise InvalidRequest(f"{name} has value {shown(value)}; expected {self}")
        return value

    def __str__(self) -> str:
        return "true or false" if self.also is None else f'true, false or "{self.also}"'

    def schema(self) -> dict[str, Any]:
        return {"type": "boolean"} if self.also is None else {"enum": [True, False, self.also]}


@dataclass(frozen=True)
class Texts:
    """One string or a list of strings; empty ones are dropped, since clients of one-tensor-per-parameter backends send
    "" for "none"."""

    max_texts: int = MAX_STOP_STRINGS

    def parse(self, name: str, value: Any) -> tuple[str, ...]:
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
            raise InvalidRequest(f"{name} has value {shown(value)}; expected {self}")
        if len(texts) > self.max_texts:
            raise InvalidRequest(f"{name} has {len(texts)} entries; expected at most {self.max_texts}")
        if any(len(text) > MAX_STRING_CHARS for text in texts):
            raise InvalidRequest(f"{name} has an entry over {MAX_STRING_CHARS} characters; make it shorter")
        for text in texts:
            require_encodable(name, text)
        return tuple(text for text in texts if text)

    def __str__(self) -> str:
        return f"a string or a list of at most {self.max_texts} strings"

    def schema(self) -> dict[str, Any]:
        text = {"type": "string", "maxLength": MAX_STRING_CHARS}
        return {"anyOf": [text, {"type": "array", "items": text, "maxItems": self.max_texts}]}


@dataclass(frozen=True)
class Text:
    """One string; an empty one asks for nothing."""

    max_chars: int = 128

    def parse(self, name: str, value: Any) -> str | None:
        if not isinstance(value, str) or len(value) > self.max_chars:
            raise InvalidRequest(f"{name} has value {shown(value)}; expected {self}")
        require_encodable(name, value)
        return value or None

    def __str__(self) -> str:
        return f"a string of at most {self.max_chars} characters"

    def schema(self) -> dict[str, Any]:
        return {"type": "string", "maxLength": self.max_chars}


@dataclass(frozen=True)
class TokenIds:
    """A list of whole numbers ≥ 0. An empty list asks for nothing, and is ``None`` for ``is_optional``."""

    is_optional: bool = False

    def parse(self, name: str, value: Any) -> tuple[int, ...] | None:
        ids = [value] if isinstance(value, (int, str)) else value
        if isinstance(ids, (list, tuple)) and len(ids) > MAX_TOKEN_IDS:
            raise InvalidRequest(f"{name} has {len(ids)} entries; expected at most {MAX_TOKEN_IDS}")
        if isinstance(ids, (list, tuple)):
            ids = [_from_digits(i) if isinstance(i, str) else i for i in ids]
        if not isinstance(ids, (list, tuple)) or not all(is_token_id(i) for i in ids):
            raise InvalidRequest(f"{name} has value {shown(value)}; expected {self}")
        return None if self.is_optional and not ids else tuple(ids)

    def __str__(self) -> str:
        return f"a list of at most {MAX_TOKEN_IDS} token ids ≥ 0"

    def schema(self) -> dict[str, Any]:
        return {
            "type": "array",
            "items": {"type": "integer", "minimum": 0, "maximum": LARGE},
            "maxItems": MAX_TOKEN_IDS,
        }


@dataclass(frozen=True)
class Biases:
    """An object {token id: bias}, or a list of [token id, bias], with biases from -100 to 100."""

    def parse(self, name: str, value: Any) -> tuple[tuple[int, float], ...]:
        pairs: Iterable[Any] = value.items() if isinstance(value, Mapping) else value
        if not isinstance(value, (Mapping, list, tuple)):
            raise InvalidRequest(f"{name} has value {shown(value)}; expected {self}")
        if len(value) > MAX_BIASES:
            raise InvalidRequest(f"{name} has {len(value)} entries; expected at most {MAX_BIASES}")
        biases: dict[int, float] = {}
        for pair in pairs:
            if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                raise InvalidRequest(f"{name} has an entry {shown(pair)}; expected {self}")
            token_id = Number(int, 0, LARGE).parse(f"a token id of {name}", pair[0])
            biases[int(token_id)] = float(Number(float, -100.0, 100.0).parse(f"{name} of token {token_id}", pair[1]))
        return tuple(sorted(biases.items()))

    def __str__(self) -> str:
        return f"an object of at most {MAX_BIASES} pairs of a token id and a number from -100 to 100"

    def schema(self) -> dict[str, Any]:
        bias = {"type": "number", "minimum": -100, "maximum": 100}
        names = {"pattern": "^[0-9]{1,9}$"}
        return {"type": "object", "propertyNames": names, "additionalProperties": bias, "maxProperties": MAX_BIASES}


def _from_digits(text: str) -> int | str:
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= 10 else text


def is_token_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGE


def require_encodable(name: str, text: str) -> None:
    """Half of a surrogate pair is valid JSON but no text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"{name} has half a character (\\u{ord(text[error.start]):04x}) at position {error.start}; send whole "
            "characters"
        ) from None


def shown(value: Any) -> str:
    """A client's value for an error message: JSON where possible, never longer than a line."""
    if isinstance(value, (list, tuple, dict, str)) and len(value) > 1000:
        return f"{type(value).__name__} of {len(value)} elements"
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        text = _python_shown(value)
    return text if len(text) <= 80 else text[:77] + "…"


def _python_shown(value: Any) -> str:
    try:
        return repr(value)
    except (ValueError, RecursionError):  # an int of thousands of digits, or lists in lists in lists
        return f"a {type(value).__name__} that is too large to show"
