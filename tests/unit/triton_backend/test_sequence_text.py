"""Stop strings in growing text: what is released, and when, against the obvious definition."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.triton_backend.test_text_stream import ids_of, tokenizer_of
from tests.unit.triton_backend.tiny_tokenizers import KINDS
from triton_backend.output_processor import texts_of
from triton_backend.sampling_params import SamplingParams
from triton_backend.sequence_text import SequenceText, text_of

pytestmark = pytest.mark.unit
FFFD = "\N{REPLACEMENT CHARACTER}"


class ScriptedTokenizer:
    """Its token i reads as the i-th of the given texts; the last of them comes when the stream is flushed."""

    def __init__(self, texts: list[str]) -> None:
        self._texts = texts
        self.pending = ""

    def stream(self, skip_special_tokens: bool) -> ScriptedTokenizer:
        return self

    def append(self, token_id: int) -> str:
        return self._texts[token_id]

    def flush(self) -> str:
        return self._texts[-1]


def cut(texts: list[str], params: SamplingParams) -> tuple[int, str]:
    """The definition: how many texts are taken, and the whole text, cut at the first stop string."""
    text = ""
    for count, new in enumerate(texts, 1):
        old, text = text, text + new
        if min(count, len(texts) - 1) <= params.min_tokens:
            continue
        found = [
            (begin, begin + len(stop))
            for stop in params.stop
            for begin in range(len(text))
            if text.startswith(stop, begin) and begin + len(stop) > len(old)
        ]
        if found:
            begin, end = min(found)
            return count, text[: end if params.include_stop_str_in_output else begin]
    return len(texts), text


letters = st.text("ab", max_size=5)
stops = st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=5).map(tuple)


@settings(max_examples=1500, deadline=None, derandomize=True, database=None)
@given(st.lists(letters, min_size=1, max_size=12), stops, st.booleans(), st.integers(0, 3))
def test_released_text_is_the_text_up_to_the_first_stop_string(texts, stop, include, min_tokens):
    params = SamplingParams(stop=stop, include_stop_str_in_output=include, min_tokens=min_tokens)
    text, released, count, stopped = SequenceText(params, ScriptedTokenizer(texts)), [], 0, False
    while count < len(texts) - 1 and not stopped:
        stopped = text.append(count, may_stop=count + 1 > min_tokens)
        count += 1
        released.append(text.release(is_finished=False))
        if not stopped:
            assert "".join(released) == without_beginnings("".join(texts[:count]), stop)
    if not stopped:
        stopped = text.finish(may_stop=count > min_tokens)
        count += 1
    whole = "".join(released) + text.release(is_finished=True)
    assert (count, whole) == cut(texts, params)


def without_beginnings(text: str, stops: tuple[str, ...]) -> str:
    """All but the longest end of the text that may become a stop string."""
    ends = [size for size in range(1, len(text) + 1) if any(stop[:size] == text[-size:] != stop for stop in stops)]
    return text[: len(text) - max(ends, default=0)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_stops_as_soon_as_its_decoded_text_has_a_stop_string(kind):
    tokenizer = tokenizer_of(kind)
    vocab_size = tokenizer._tokenizer.get_vocab_size()

    @settings(max_examples=80, deadline=None, derandomize=True, database=None)
    @given(st.lists(st.integers(0, vocab_size - 1), min_size=1, max_size=12), st.data())
    def check(ids: list[int], data: st.DataObject) -> None:
        whole = tokenizer.decode(ids)
        begin = data.draw(st.integers(0, len(whole)))
        stop = whole[begin : begin + data.draw(st.integers(1, 4))].strip(FFFD) or "\n"
        expected = next((text for text in prefixes(tokenizer, ids) if stop in text), whole).partition(stop)[0]
        if FFFD not in stop:
            assert text_of(ids, False, SamplingParams(stop=(stop, "no such")), tokenizer) == expected

    check()


def prefixes(tokenizer, ids: list[int]) -> list[str]:
    return [tokenizer.decode(ids[:count]) for count in range(1, len(ids) + 1)]


def test_a_line_break_in_a_byte_token_stops_at_once():
    """Its text is not certain yet, because more bytes could follow and spoil it; but it can be read."""
    the, line_break = ids_of("words_llama", "the", "<0x0A>")
    text = SequenceText(SamplingParams(stop=("\n",)), tokenizer_of("words_llama"))
    assert [text.append(token_id, may_stop=True) for token_id in (the, line_break)] == [False, True]
    assert text.release(is_finished=True) == "the"


def test_a_line_break_before_min_tokens_does_not_stop_later():
    the, line_break = ids_of("words_llama", "the", "<0x0A>")
    tokenizer = tokenizer_of("words_llama")
    params = SamplingParams(stop=("\n",), min_tokens=2, max_tokens=9)
    assert text_of([the, line_break, the], False, params, tokenizer) == "the\nthe"
    assert text_of([the, line_break, line_break, the], False, params, tokenizer) == "the\n"


def test_the_end_token_is_shown_only_if_asked_for():
    the, end = ids_of("words_llama", "the", "</s>")
    tokenizer = tokenizer_of("words_llama")
    shown = SamplingParams(include_stop_str_in_output=True, skip_special_tokens=False)
    assert text_of([the, end], True, SamplingParams(skip_special_tokens=False), tokenizer) == "the"
    assert text_of([the, end], True, shown, tokenizer) == "the</s>"
    assert text_of([the, end], False, SamplingParams(skip_special_tokens=False), tokenizer) == "the</s>"
    assert text_of([], False, shown, tokenizer) == ""


def test_what_looked_like_a_stop_string_is_released_in_the_end():
    texts = ["the fr", "o", "g"]
    text = SequenceText(SamplingParams(stop=("from", "rogue")), ScriptedTokenizer([*texts, " frog"]))
    deltas = []
    for token_id in range(3):
        assert not text.append(token_id, may_stop=True)
        deltas.append(text.release(is_finished=False))
    assert deltas == ["the ", "", "f"]
    assert not text.finish(may_stop=True)
    assert text.release(is_finished=False) == "rog f"
    assert text.release(is_finished=True) == "rog"


def test_only_what_may_become_a_stop_string_is_kept_of_released_text():
    text = SequenceText(SamplingParams(stop=("b" * 256,)), ScriptedTokenizer(["abb"]))
    for _ in range(1000):
        text.append(0, may_stop=True)
        text.release(is_finished=False)
    assert (text._decided, text._held, text._seen) == ([], "bb", "bb")


def test_of_two_stop_strings_the_one_that_begins_first_cuts_and_then_the_shorter():
    def text(*stop: str, texts: tuple[str, ...] = ("xabcdx",)) -> str:
        params = SamplingParams(stop=stop, include_stop_str_in_output=True)
        return text_of(range(len(texts)), False, params, ScriptedTokenizer([*texts, ""]))

    assert text("cd", "abcd") == "xabcd"
    assert text("abcd", "ab") == "xab"
    assert text("abcd", "bc", texts=("xabc", "dx")) == "xabc"


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_the_next_token_begins_behind_a_character_of_bytes_that_is_complete(kind):
    ids = ids_of(kind, "b", "<0xE2>", "<0x82>", "<0xAC>", "b", "b")
    text = SequenceText(SamplingParams(), tokenizer_of(kind))
    begins = []
    for token_id in ids:
        begins.append(text.num_chars)
        text.append(token_id, may_stop=True)
    assert begins == [0, 1, 1, 1, 2, 3]
    assert texts_of(ids, SamplingParams(), tokenizer_of(kind)) == ["b", "", "", "€", "b", "b"]


@given(st.sampled_from(sorted(KINDS)), st.data())
@settings(max_examples=200, deadline=None)
def test_the_texts_of_tokens_join_to_the_text_of_all(kind, data):
    tokenizer = tokenizer_of(kind)
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), min_size=1, max_size=30))
    stream = tokenizer.stream(True)
    whole = "".join(map(stream.append, ids)) + stream.flush()
    assert "".join(texts_of(ids, SamplingParams(), tokenizer)) == whole
