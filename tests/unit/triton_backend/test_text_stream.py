"""Text streams: token by token, exactly what the tokenizers library decodes from all the tokens."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from tests.unit.triton_backend.tiny_tokenizers import KINDS, TEXTS, save
from triton_backend.text_stream import ByteLevelText, WholeText, WordText, byte_of_char
from triton_backend.tokenizer import Tokenizer

pytestmark = pytest.mark.unit
FFFD = "\N{REPLACEMENT CHARACTER}"


@functools.cache
def tokenizer_of(kind: str) -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        return Tokenizer(save(KINDS[kind](), Path(folder)))


def ids_of(kind: str, *tokens: str) -> list[int]:
    return [tokenizer_of(kind)._tokenizer.token_to_id(token) for token in tokens]


def streamed(kind: str, ids: list[int], skip_special_tokens: bool = True) -> list[str]:
    """The text of every token, then what was held."""
    stream = tokenizer_of(kind).stream(skip_special_tokens)
    return [*(stream.append(token_id) for token_id in ids), stream.flush()]


@pytest.mark.parametrize("skip_special_tokens", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_streamed_text_is_the_decoded_text_for_any_tokens(kind, skip_special_tokens):
    tokenizer = tokenizer_of(kind)
    vocab_size = tokenizer._tokenizer.get_vocab_size()
    anywhere = st.integers(0, vocab_size + 3)  # also ids that the tokenizer does not know
    nearby = st.integers(max(0, vocab_size - 12), vocab_size - 1)  # added tokens

    @settings(max_examples=150, deadline=None, derandomize=True, database=None)
    @given(st.lists(anywhere | nearby, max_size=24))
    def check(ids: list[int]) -> None:
        *deltas, rest = streamed(kind, ids, skip_special_tokens)
        assert "".join(deltas) + rest == tokenizer.decode(ids, skip_special_tokens)

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_pending_text_is_what_the_end_would_make_certain(kind):
    tokenizer = tokenizer_of(kind)

    @settings(max_examples=80, deadline=None, derandomize=True, database=None)
    @given(st.lists(st.integers(0, tokenizer._tokenizer.get_vocab_size() - 1), max_size=16))
    def check(ids: list[int]) -> None:
        stream = tokenizer.stream(skip_special_tokens=True)
        for token_id in ids:
            stream.append(token_id)
        pending = stream.pending
        rest = stream.flush()
        assert pending in (rest, rest.rstrip(FFFD)) or set(rest) == {FFFD}
        assert stream.pending == ""

    check()


@settings(max_examples=500, deadline=None, derandomize=True, database=None)
@given(st.binary(max_size=12), st.sampled_from(["llama", "words_llama", "byte_level"]))
def test_any_bytes_are_decoded_as_the_library_decodes_them(data, kind):
    chars = {byte: char for char, byte in byte_of_char().items()}
    names = [chars[byte] if kind == "byte_level" else f"<0x{byte:02X}>" for byte in data]
    ids = ids_of(kind, *names)
    assert "".join(streamed(kind, ids)) == tokenizer_of(kind).decode(ids)


def test_the_byte_level_alphabet_is_the_librarys():
    assert sorted(byte_of_char()) == sorted(pre_tokenizers.ByteLevel.alphabet())


@pytest.mark.parametrize("kind", ["byte_level", "byte_level_split", "llama", "gemma"])
def test_characters_of_many_tokens_arrive_whole(kind):
    tokenizer = tokenizer_of(kind)
    for text in (*TEXTS, "👩‍👩‍👧👍🏽 e\u0301\u0323 \U0001f1e9\U0001f1ea ꙮ", "\x00\x7f\ufffd"):
        ids = list(tokenizer.encode(text))
        *deltas, rest = streamed(kind, ids)
        assert "".join(deltas) + rest == tokenizer.decode(ids)
        assert FFFD not in "".join(deltas) or FFFD in text


def test_a_decoder_that_is_not_known_is_decoded_as_a_whole():
    kinds = {kind: type(tokenizer_of(kind)._new_text()) for kind in KINDS}
    assert {kind for kind, text in kinds.items() if text is WholeText} == {"words_across", "words_ctc"}
    assert {kind for kind, text in kinds.items() if text is ByteLevelText} == {"byte_level", "byte_level_split"}
    assert all(text is WordText for kind, text in kinds.items() if kind in ("llama", "gemma", "unigram", "word_piece"))


def test_the_space_of_the_first_word_is_dropped_and_no_other():
    for kind in ("words_llama", "words_always", "words_first"):
        the, special, space = ids_of(kind, "▁the", "<s>", "▁")
        assert streamed(kind, [special, the, special, the]) == ["", "the", "", " the", ""]
        assert streamed(kind, [space, special, the]) == ["", "", " the", ""]
        assert streamed(kind, [special, the], skip_special_tokens=False)[:2] == ["<s>", " the"]


def test_byte_tokens_wait_until_nothing_can_spoil_them():
    euro, word, bad = ids_of("words_llama", "<0xE2>", "<0x82>", "<0xAC>"), *ids_of("words_llama", "the", "<0xFF>")
    assert streamed("words_llama", [*euro, word]) == ["", "", "", "€the", ""]
    assert streamed("words_llama", [*euro, bad, euro[0]]) == ["", "", "", FFFD * 4, FFFD, ""]
    stream = tokenizer_of("words_llama").stream(skip_special_tokens=True)
    assert [stream.append(token_id) + stream.pending for token_id in euro] == ["", "", "€"]


def test_bytes_that_never_become_a_character_are_told_at_once():
    """So what is held, and the work of a token, stays the same however many of them come."""
    for kind, char in (("byte_level", "ÿ"), ("byte_level", "Ģ"), ("words_llama", "<0x80>")):
        (bad,) = ids_of(kind, char)
        assert streamed(kind, [bad] * 5000) == [FFFD] * 5000 + [""]


def test_no_more_than_two_tokens_are_decoded_for_one():
    seen = []

    def decode(tokens: list[str]) -> str:
        seen.append(len(tokens))
        return "".join(tokens)

    text = WordText(decode, has_byte_tokens=True, strip_char=" ", strip=1)
    for token in ["a", "<0xE2>", "<0x82>"] * 100:
        text.add(token)
    assert max(seen) == 2
