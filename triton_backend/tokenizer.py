"""Text to token ids and back, from a version folder's ``tokenizer.json``.

Uses the ``tokenizers`` library directly: importing transformers would add seconds to a model load and hundreds of MiB
to its process. Safe to use from any thread; the streams that it makes belong to the engine thread.
"""

from __future__ import annotations

from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models, pre_tokenizers

from triton_backend.errors import InvalidRequest, VersionFolderError
from triton_backend.text_stream import TextStream, steps_of, text_maker

# The decomposition of no composed character has more than four characters.
_NFC_SHRINKS_BY = 4
# Steps before the model that drop no character, unless they are told to remove what they split at.
_KEEPING_SPLITS = ("ByteLevel", "Digits", "Metaspace", "Punctuation", "Split", "UnicodeScripts")


class Tokenizer:
    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.json"
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise VersionFolderError(f"cannot read {path}: {error}") from error
        self._plain = lru_cache(maxsize=4096)(partial(self._encode, add_special_tokens=False))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._new_text = text_maker(self._tokenizer.decoder)
        added = self._tokenizer.get_added_tokens_decoder().values()
        self._special_tokens = frozenset(token.content for token in added if token.special)
        self._chars_per_token = chars_per_token(self._tokenizer)

    def encode(self, text: str, max_tokens: int | None = None) -> tuple[int, ...]:
        """Token ids of a prompt, with the special tokens that the model's own tokenizer adds.

        A text that is certain to have more than ``max_tokens`` is refused unread: a second per MiB is saved. Raises
        InvalidRequest for that, and for text that is not Unicode or that the tokenizer has no tokens for.
        """
        self._check_length(text, max_tokens)
        return self._encode(text, add_special_tokens=True)

    def encode_plain(self, text: str) -> tuple[int, ...]:
        """Token ids of a piece of text, nothing added; kept for a while. Raises InvalidRequest."""
        return self._plain(text)

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        """How one token reads by itself; parts of a character show as U+FFFD."""
        return self._tokenizer.decode([token_id], skip_special_tokens=False)

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size()

    def to_json(self) -> str:
        return self._tokenizer.to_str()

    def stream(self, skip_special_tokens: bool) -> TextStream:
        token_of = self._unskipped_token if skip_special_tokens else self._tokenizer.id_to_token
        return TextStream(token_of, self._new_text())

    def _unskipped_token(self, token_id: int) -> str | None:
        token = self._tokenizer.id_to_token(token_id)
        return None if token in self._special_tokens else token

    def _encode(self, text: str, add_special_tokens: bool) -> tuple[int, ...]:
        _check_unicode(text)
        try:
            # Unlike encode, a batch lets other threads run meanwhile, and "fast" counts no offsets: half the time.
            return tuple(self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)
        except Exception as error:  # the library raises plain Exception
            raise InvalidRequest(f"the tokenizer cannot read the text: {error}; change the text") from error

    def _check_length(self, text: str, max_tokens: int | None) -> None:
        if max_tokens is None or self._chars_per_token is None:
            return
        least = -(-len(text) // self._chars_per_token)
        if least > max_tokens:
            raise InvalidRequest(
                f"the prompt has {len(text)} characters, which are at least {least} tokens; expected at most "
                f"{max_tokens} tokens; shorten the prompt"
            )


def chars_per_token(tokenizer: tokenizers.Tokenizer) -> int | None:
    """How many characters of a text one token covers at most; None if that has no bound.

    There is a bound where no text is lost: every byte has a token, so that nothing is unknown, and nothing but spelling
    is normalized. There is none where, say, any long word becomes one unknown token.
    """
    normalizers = steps_of("normalizer", tokenizer.normalizer)
    splits = steps_of("pre_tokenizer", tokenizer.pre_tokenizer)
    added = tokenizer.get_added_tokens_decoder().values()
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    is_bounded = (
        all(map(_keeps_length, normalizers))
        and all(split["type"] in _KEEPING_SPLITS and split.get("behavior") != "Removed" for split in splits)
        and not any(token.lstrip or token.rstrip for token in added)  # these swallow any number of spaces
        and _knows_all_bytes(tokenizer.model, splits, vocab)
    )
    if not is_bounded:
        return None
    normalized = tokenizer.normalizer.normalize_str if normalizers else str
    longest = max(map(len, [*vocab, *(normalized(token.content) for token in added)]))
    return longest * _NFC_SHRINKS_BY if any(step["type"] == "NFC" for step in normalizers) else longest


def _knows_all_bytes(model: Any, splits: list[dict[str, Any]], vocab: dict[str, int]) -> bool:
    if not isinstance(model, models.BPE):  # the others have unknown words, or do not tell
        return False
    if any(split["type"] == "ByteLevel" for split in splits):
        return all(char in vocab for char in pre_tokenizers.ByteLevel.alphabet())
    return model.byte_fallback and all(f"<0x{byte:02X}>" in vocab for byte in range(256))


def _keeps_length(normalizer: dict[str, Any]) -> bool:
    if normalizer["type"] == "Replace":
        pattern = normalizer["pattern"].get("String")
        return pattern is not None and len(pattern) <= len(normalizer["content"])
    return normalizer["type"] in ("NFC", "Prepend")


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"the text has half a surrogate pair, {text[error.start]!a}, at character {error.start}; expected "
            "Unicode text; send both halves or neither"
        ) from None
