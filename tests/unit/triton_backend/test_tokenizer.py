"""Encoding: special tokens, text that is no Unicode, and prompts that are certain to be too long."""

from __future__ import annotations

import threading
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Library

from tests.unit.triton_backend.test_text_stream import tokenizer_of
from tests.unit.triton_backend.tiny_tokenizers import KINDS, TEXTS, byte_level, byte_level_split, save
from triton_backend.errors import InvalidRequest, VersionFolderError
from triton_backend.tokenizer import Tokenizer, chars_per_token

pytestmark = pytest.mark.unit
BOUNDED = {"byte_level", "byte_level_split", "llama", "gemma"}


def test_a_prompt_gets_the_models_special_tokens_and_a_piece_of_text_none(tmp_path):
    library = byte_level()
    special_tokens = [("<s>", library.token_to_id("<s>"))]
    library.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=special_tokens)
    tokenizer = Tokenizer(save(library, tmp_path))
    assert tokenizer.encode_plain("The café") == tuple(library.encode("The café", add_special_tokens=False).ids)
    assert tokenizer.encode("The café") == (library.token_to_id("<s>"), *tokenizer.encode_plain("The café"))
    assert tokenizer.encode_plain("") == ()


def test_padding_and_truncation_of_the_file_are_ignored(tmp_path):
    library = byte_level()
    library.enable_truncation(3)
    library.enable_padding(length=50)
    ids = Tokenizer(save(library, tmp_path)).encode(TEXTS[0])
    assert len(ids) > 3 and ids == tokenizer_of("byte_level").encode(TEXTS[0])


@pytest.mark.parametrize("kind", KINDS)
def test_every_text_is_encoded_as_the_library_encodes_it(kind):
    tokenizer = tokenizer_of(kind)
    for text in (*TEXTS, "", " ", "\x00", "<s>the</s>", "a" * 1000):
        assert list(tokenizer.encode(text)) == tokenizer._tokenizer.encode(text).ids


def test_half_a_surrogate_pair_is_refused_with_its_place():
    for encode in (tokenizer_of("byte_level").encode, tokenizer_of("byte_level").encode_plain):
        with pytest.raises(InvalidRequest) as refused:
            encode("🙂ab\ud83d!")
        assert str(refused.value) == (
            "INVALID_ARG: the text has half a surrogate pair, '\\ud83d', at character 3; expected Unicode text; "
            "send both halves or neither"
        )


def test_text_without_tokens_is_refused_with_the_librarys_words(tmp_path):
    library = Library(models.WordLevel({"a": 0}, unk_token="[UNK]"))
    with pytest.raises(InvalidRequest, match=r"^INVALID_ARG: the tokenizer cannot read the text: .*\[UNK\]"):
        Tokenizer(save(library, tmp_path)).encode("b")


def test_a_folder_without_a_tokenizer_says_so(tmp_path):
    with pytest.raises(VersionFolderError, match=r"cannot read .*tokenizer\.json"):
        Tokenizer(tmp_path)


def test_a_prompt_that_is_certain_to_be_too_long_is_refused_unread():
    tokenizer = tokenizer_of("byte_level")
    longest = tokenizer._chars_per_token
    assert tokenizer.encode("a" * 10 * longest, max_tokens=10)
    with pytest.raises(InvalidRequest) as refused:
        tokenizer.encode("a" * (10 * longest + 1), max_tokens=10)
    assert str(refused.value) == (
        f"INVALID_ARG: the prompt has {10 * longest + 1} characters, which are at least 11 tokens; expected at most "
        "10 tokens; shorten the prompt"
    )


@pytest.mark.parametrize("kind", sorted(BOUNDED))
def test_no_token_covers_more_characters_than_the_bound_says(kind):
    tokenizer = tokenizer_of(kind)
    composed, hangul = ["\u1f82", "α\u0313\u0300\u0345"], ["\uac01", "\u1100\u1161\u11a8"]
    hard = st.sampled_from(["<|the end|>", "two words", " lead", "▁meta", " " * 9, *composed, *hangul])

    @settings(max_examples=150, deadline=None, derandomize=True, database=None)
    @given(st.lists(hard | st.text(max_size=8), max_size=12).map("".join))
    def check(text: str) -> None:
        assert len(text) <= tokenizer._chars_per_token * len(tokenizer.encode_plain(text))

    check()


def test_composition_shrinks_a_text_to_a_quarter_at_most():
    sizes = (len(unicodedata.normalize("NFD", chr(code))) for code in range(0x110000))
    assert max(sizes) == 4


def test_there_is_no_bound_where_text_can_vanish():
    assert {kind for kind in KINDS if tokenizer_of(kind)._chars_per_token} == BOUNDED

    def bound(change) -> int | None:
        tokenizer = byte_level()
        change(tokenizer)
        return chars_per_token(tokenizer)

    removed = pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel()])
    few_bytes = models.BPE(vocab={"a": 0, "b": 1}, merges=[])
    assert bound(lambda tokenizer: None) == max(map(len, byte_level().get_vocab()))
    assert bound(lambda tokenizer: tokenizer.add_tokens([AddedToken("<mask>", lstrip=True)])) is None
    assert bound(lambda tokenizer: setattr(tokenizer, "normalizer", normalizers.NFKC())) is None
    assert bound(lambda tokenizer: setattr(tokenizer, "normalizer", normalizers.Replace("  ", " "))) is None
    assert bound(lambda tokenizer: setattr(tokenizer, "pre_tokenizer", removed)) is None
    assert bound(lambda tokenizer: setattr(tokenizer, "model", few_bytes)) is None
    assert chars_per_token(byte_level_split()) == 4 * chars_per_token(byte_level())


def test_other_threads_run_while_a_long_text_is_encoded():
    """Otherwise one long prompt would halt every running stream for seconds."""
    tokenizer = tokenizer_of("byte_level")
    is_encoded, num_turns = threading.Event(), 0

    def encode() -> None:
        tokenizer.encode("The import statement " * 20_000)
        is_encoded.set()

    thread = threading.Thread(target=encode)
    thread.start()
    while not is_encoded.wait(0.002):
        num_turns += 1
    thread.join()
    assert num_turns > 3


def test_token_text_shows_parts_of_characters():
    tokenizer = tokenizer_of("byte_level")
    assert tokenizer.token_text(tokenizer.encode("the")[0]) in "the"
    assert tokenizer.token_text(tokenizer._tokenizer.token_to_id("ð")) == "\ufffd"
    assert isinstance(tokenizer._tokenizer.decoder, decoders.ByteLevel)
