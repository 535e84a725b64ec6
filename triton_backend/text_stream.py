"""Token ids to text, one at a time: after each token, the text that no later token can change.

All texts of a ``TextStream`` joined are exactly what decoding all its ids at once gives, and none ends inside a
character. tokenizers' own ``DecodeStream`` does not promise that: it raises when a byte token spoils the ones before
it, and decodes again and again what never becomes a character. How a token reads depends on the decoder in
tokenizer.json: ``ByteLevelText``, ``WordText`` with its ``ByteRun``, or ``WholeText`` for a decoder not known here.
But for the last, each token costs the same, however long the text. Owned by the engine thread.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable
from functools import partial
from itertools import takewhile
from typing import Any, Protocol

import tokenizers
from tokenizers import models

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")
# Decoder steps that treat a token by itself, except that some drop or add a space at the first one.
_PER_TOKEN = ("Replace", "Metaspace", "WordPiece", "Strip")


class Text(Protocol):
    """Text that grows token by token."""

    @property
    def pending(self) -> str:
        """How the tokens that are not certain yet would read if no other byte followed."""

    def add(self, token: str) -> str:
        """Text that became certain with this token."""

    def end(self) -> str:
        """What was held, now that no token follows."""


class TextStream:
    """The text of one sequence."""

    def __init__(self, token_of: Callable[[int], str | None], text: Text) -> None:
        self._token_of = token_of
        self._text = text

    @property
    def pending(self) -> str:
        """Whole characters that ``append`` still holds: more byte tokens could turn them into U+FFFD."""
        return self._text.pending

    def append(self, token_id: int) -> str:
        """Text that became certain with this token; empty for ids that are skipped or unknown."""
        token = self._token_of(token_id)
        return "" if token is None else self._text.add(token)

    def flush(self) -> str:
        """What the held tokens read as at the end; an unfinished character is U+FFFD."""
        return self._text.end()


class ByteLevelText:
    """GPT-2's byte-level tokens: every character of a token stands for a byte."""

    pending = ""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: str) -> str:
        return self._utf8.decode(_bytes_of(token))

    def end(self) -> str:
        return self._utf8.decode(b"", final=True)


class ByteRun:
    """Consecutive byte tokens, ``<0xE2> <0x82> <0xAC>``: one spoilt byte makes all of them U+FFFD.

    So their text is certain only when another token follows, or when the run is spoilt.
    """

    def __init__(self) -> None:
        self.pending = ""
        self._num_bytes = 0
        self._is_spoilt = False
        self._utf8 = codecs.getincrementaldecoder("utf-8")("strict")

    def add(self, byte: int) -> str:
        self._num_bytes += 1
        if self._is_spoilt:
            return _REPLACEMENT
        try:
            self.pending += self._utf8.decode(bytes((byte,)))
        except UnicodeDecodeError:
            self.pending = ""
            self._is_spoilt = True
            return _REPLACEMENT * self._num_bytes
        return ""

    def end(self) -> str:
        """What was held, now that another token follows, or none."""
        is_inside_character = bool(self._utf8.getstate()[0])
        if self._is_spoilt or not is_inside_character:
            return self.pending
        return _REPLACEMENT * self._num_bytes


class WordText:
    """Tokens that read by themselves, but for a space at the beginning and a separator after the token before.

    ``decode`` is the decoder up to where byte tokens are put together; ``strip`` counts the leading ``strip_char`` that
    are dropped from the text as a whole (one space, for Llama).
    """

    def __init__(self, decode: Callable[[list[str]], str], has_byte_tokens: bool, strip_char: str, strip: int) -> None:
        self._decode = decode
        self._has_byte_tokens = has_byte_tokens
        self._strip_char = strip_char
        self._num_to_strip = strip
        self._previous: list[str] = []
        self._run: ByteRun | None = None

    @property
    def pending(self) -> str:
        pending = self._run.pending if self._run else ""
        return pending[self._num_stripped(pending) :]

    def add(self, token: str) -> str:
        byte = _BYTE_TOKEN.fullmatch(token) if self._has_byte_tokens else None
        if byte:
            self._run = self._run or ByteRun()
            text = self._run.add(int(byte[1], 16))
        else:
            before = self._decode(self._previous) if self._previous else ""
            text = self._end_run() + self._decode([*self._previous, token])[len(before) :]
        self._previous = [token]
        return self._stripped(text)

    def end(self) -> str:
        return self._stripped(self._end_run())

    def _end_run(self) -> str:
        run, self._run = self._run, None
        return run.end() if run else ""

    def _stripped(self, text: str) -> str:
        if not self._num_to_strip or not text:
            return text
        num_stripped = self._num_stripped(text)
        self._num_to_strip = self._num_to_strip - num_stripped if num_stripped == len(text) else 0
        return text[num_stripped:]

    def _num_stripped(self, text: str) -> int:
        head = text[: self._num_to_strip]
        return len(head) - len(head.lstrip(self._strip_char)) if head else 0


class WholeText:
    """Any other decoder: nothing is certain before the end, and each look at ``pending`` decodes everything."""

    def __init__(self, decode: Callable[[list[str]], str]) -> None:
        self._decode = decode
        self._tokens: list[str] = []

    @property
    def pending(self) -> str:
        return self._decode(self._tokens).rstrip(_REPLACEMENT)

    def add(self, token: str) -> str:
        self._tokens.append(token)
        return ""

    def end(self) -> str:
        tokens, self._tokens = self._tokens, []
        return self._decode(tokens)


def text_maker(decoder: Any | None) -> Callable[[], Text]:
    """What makes an empty ``Text`` for a decoder of the tokenizers library (None: words with spaces between)."""
    if decoder is None:
        return partial(WordText, " ".join, False, "", 0)
    steps = steps_of("decoder", decoder)
    names = [step["type"] for step in steps]
    if names == ["ByteLevel"]:
        return ByteLevelText
    if names == ["BPEDecoder"]:
        return partial(WordText, decoder.decode, False, "", 0)
    words = list(takewhile(lambda step: step["type"] in _PER_TOKEN, steps))
    rest, strip_char, strip = names[len(words) :], "", 0
    if rest[-2:] == ["Fuse", "Strip"] and steps[-1]["stop"] == 0:
        rest, strip_char, strip = rest[:-1], steps[-1]["content"], steps[-1]["start"]
    if rest not in ([], ["ByteFallback"], ["Fuse"], ["ByteFallback", "Fuse"]):
        return partial(WholeText, decoder.decode)
    return partial(WordText, _decoder_of(words).decode, "ByteFallback" in rest, strip_char, strip)


def steps_of(name: str, part: Any | None) -> list[dict[str, Any]]:
    """The steps of a tokenizer's ``normalizer``, ``pre_tokenizer`` or ``decoder``, as tokenizer.json describes them."""
    if part is None:
        return []
    blank = tokenizers.Tokenizer(models.BPE())
    setattr(blank, name, part)
    return _flat(json.loads(blank.to_str())[name])


def _flat(step: dict[str, Any]) -> list[dict[str, Any]]:
    if step["type"] != "Sequence":
        return [step]
    (inner_steps,) = (value for value in step.values() if isinstance(value, list))
    return [flat for inner in inner_steps for flat in _flat(inner)]


def _decoder_of(steps: list[dict[str, Any]]) -> Any:
    blank = json.loads(tokenizers.Tokenizer(models.BPE()).to_str())
    blank["decoder"] = {"type": "Sequence", "decoders": steps}
    return tokenizers.Tokenizer.from_str(json.dumps(blank)).decoder


def byte_of_char() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes are the characters of Latin-1; the others follow from U+0100 on, in order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHAR = byte_of_char()


def _bytes_of(token: str) -> bytes:
    try:
        return bytes(map(_BYTE_OF_CHAR.__getitem__, token))
    except KeyError:  # an added token, which is plain text
        return token.encode()
