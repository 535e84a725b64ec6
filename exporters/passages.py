"""What is read to compare two models: a prompt and what was written after it, or a piece of text and what follows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from exporters import held_out
from exporters.errors import InvalidConfig
from exporters.prompts import Prompt
from triton_backend.config import VersionConfig

MAX_TEXT_TOKENS = {"fp32": 512}
"""Where every logit is within float error, a part of the text shows it; what is rounded is measured on all of it."""


@dataclass(frozen=True)
class Passage:
    """What a decoder reads, and what it should say: the last positions of ``ids`` predict ``tokens``.

    ``source`` is what the encoder of an encoder–decoder reads; empty for other models.
    """

    ids: tuple[int, ...]
    tokens: tuple[int, ...]
    source: tuple[int, ...] = ()

    @property
    def first(self) -> int:
        """The position that predicts the first token."""
        return len(self.ids) - len(self.tokens)


def passage_of(config: VersionConfig, prompt: Prompt, tokens: Sequence[int]) -> Passage:
    """What the decoder has read when it has written ``tokens`` after ``prompt``; its last token is read by nobody."""
    if config.model.kind != "encoder_decoder":
        return Passage((*prompt.ids, *tokens[:-1]), tuple(tokens))
    start, forced = config.model.decoder_start_token_id, config.model.forced_bos_token_id
    assert start is not None, "model.json of an encoder–decoder names its decoder_start_token_id"
    written = list(tokens)
    if forced is not None:  # it is no choice of the model, so it is nothing to compare
        written = written[1:] if written[:1] == [forced] else written
        return Passage((start, forced, *written[:-1]), tuple(written), prompt.ids)
    return Passage((start, *written[:-1]), tuple(written), prompt.ids)


def text_passages(config: VersionConfig, encode: Callable[[str], list[int]], text: str) -> list[Passage]:
    """``text`` in pieces that fit the model. An encoder–decoder reads each piece and is to write it again."""
    max_len = config.engine.max_model_len
    if config.model.kind == "encoder_decoder":
        # With the tokens that a decoder begins with, no more than the graph takes at once: a source's length.
        max_len = max(2, min(max_len, config.engine.max_source_len) - 2)
    max_tokens = MAX_TEXT_TOKENS.get(config.model.precision, held_out.MAX_TOKENS)
    windows = held_out.windows_of(encode, text, max_len, max_tokens)
    if not windows:
        raise InvalidConfig("the evaluation text has fewer than 2 tokens; expected some paragraphs of text")
    if config.model.kind == "encoder_decoder":
        # Sources may have a vocabulary of their own; what is written then means nothing, but can still be compared.
        targets = [tuple(token % config.model.vocab_size for token in window) for window in windows]
        prompts = [Prompt("text", window, len(window)) for window in windows]
        return [passage_of(config, prompt, target) for prompt, target in zip(prompts, targets, strict=True)]
    return [Passage(window[:-1], window[1:]) for window in windows]
