"""The byte-level tokenizer gives back every text it is given."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from control_plane.training.config import MIN_VOCAB_SIZE
from control_plane.training.tokenizer import END_OF_TEXT, train_tokenizer

pytestmark = pytest.mark.integration

TEXTS = ["The import statement finds a module and binds a name.", "The name is bound in the local namespace."] * 3


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, vocab_size=300, model_max_length=64)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "The import",
        "  two  spaces , and\ttab\r\n",
        "naïve Ωμέγα 中文 𝒳",
        "👩‍👩‍👧 🇪🇺 é",
        "".join(map(chr, range(591))),
    ],
    ids=["empty", "space", "known", "white space", "scripts", "emoji", "many characters"],
)
def test_text_comes_back_unchanged(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_every_byte_has_a_token(tokenizer: PreTrainedTokenizerFast) -> None:
    alphabet = tokenizer.convert_tokens_to_ids(list("Ġ!~¡¿ÿĀń"))
    assert len(tokenizer) >= MIN_VOCAB_SIZE and len(set(alphabet)) == 8


def test_training_learns_words(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer("The name")["input_ids"]) < 4


def test_end_of_text_is_one_token_and_never_added(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer(END_OF_TEXT)["input_ids"] == [tokenizer.eos_token_id]
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == tokenizer.pad_token_id
    assert tokenizer.eos_token_id not in tokenizer("The name")["input_ids"]


def test_same_texts_give_the_same_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    again = train_tokenizer(TEXTS, vocab_size=300, model_max_length=64)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
