"""Text to token ids and back, from a version folder's ``tokenizer.json``.

Uses the ``tokenizers`` library directly: importing transformers would add seconds to a model load and hundreds of MiB
to its process. ``encode`` and ``decode`` may be called from any thread; a ``TextStream`` belongs to the engine thread.
"""

from __future__ import annotations

from pathlib import Path

import tokenizers
from tokenizers.decoders import DecodeStream

from triton_backend.errors import VersionFolderError

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Tokenizer:
    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.json"
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise VersionFolderError(f"cannot read {path}: {error}") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a prompt, with the special tokens that the model's own tokenizer adds."""
        return tuple(self._tokenizer.encode(text).ids)

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        """How one token reads by itself; parts of a character show as U+FFFD."""
        return self._tokenizer.decode([token_id], skip_special_tokens=False)

    def stream(self, skip_special_tokens: bool) -> TextStream:
        return TextStream(self._tokenizer, skip_special_tokens)


class TextStream:
    """Decodes one sequence token by token; never hands out half a character.

    The texts returned by ``append`` and finally ``flush``, joined, equal ``Tokenizer.decode`` of all the tokens.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._held: list[int] = []

    def append(self, token_id: int) -> str:
        """Text that became certain with this token; empty while a character is incomplete."""
        self._held.append(token_id)
        text = self._stream.step(self._tokenizer, token_id)
        if text is None:
            return ""
        self._held.clear()
        return text

    def flush(self) -> str:
        """What an unfinished character at the end reads as (U+FFFD)."""
        held, self._held = self._held, []
        return self._tokenizer.decode(held, skip_special_tokens=self._skip_special_tokens) if held else ""
