"""Suite ``perplexity``: how well a decoder predicts a text that it has not seen. Lower is better.

    bits_per_byte     −Σ log₂ p(token | tokens before it) / bytes of the text in UTF-8. Comparable between models with
                      different tokenizers. (Gao et al. 2020, "The Pile", section 3.1; lm-eval's ``bits_per_byte``)
    token_perplexity  exp(−Σ ln p(token | tokens before it) / number of tokens). Comparable only between versions of one
                      tokenizer. (Jelinek et al. 1977; transformers' "Perplexity of fixed-length models")

The probabilities are the model's own, before temperature and penalties: the engine's ``prompt_logprobs``. Every token
of the text is scored once. Before a document stands the token that its tokenizer begins a text with, or else the
model's bos or eos token, as in lm-eval's ``loglikelihood_rolling``; it is given, not scored.

A document that is longer than the window is read in windows that overlap; each scores what is new to it, so behind the
first window a token has at least ``window − stride`` tokens before it. (The strided sliding window of
https://huggingface.co/docs/transformers/perplexity)

    stream   b t t t t t t t t t t t t t t          window 8, stride 3
    first    b s s s s s s s                        b is given, s is scored, · is context
    second         · · · · · s s s
    last                 · · · · · s s …

The text is tokenized in pieces that end with a line, about 16 thousand characters each, so that a file of any size
needs little memory; tokens that would span such a line break are the only ones that can differ.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from exporters.errors import EngineFailed, InvalidConfig, InvalidData, InvalidVersion
from exporters.evaluate.answers import Answered, answers
from exporters.evaluate.data_file import Piece
from exporters.evaluate.report import Report, Task, Ticker
from triton_backend.config import VersionConfig

UNIT = 2.0**-40
"""Log probabilities are added up as whole numbers of this size: the sum is the same in every order."""


@dataclass(frozen=True)
class Window:
    """``ids`` are read, the last ``num_scored`` of them scored."""

    ids: tuple[int, ...]
    num_scored: int
    place: str

    def request(self) -> dict[str, Any]:
        return {"input_ids": self.ids, "sampling_parameters": {"temperature": 0, "max_tokens": 1, "prompt_logprobs": 0}}


def perplexity(task: Task) -> Report:
    """Bits per byte and perplexity of the data file; raises InvalidData, InvalidConfig, EngineFailed."""
    assert task.data is not None
    size, stride, limit = *window_and_stride(task), task.settings["limit"]
    reader = TokenReader(task.folder, task.version, limit)
    ticker = Ticker(task, limit)
    num_tokens = num_units = 0
    windows = reader.windows(task.data.pieces(), size, stride)
    with closing(answers(task.folder, task.version, windows)) as found:
        for answered in found:
            num_units += round(_logprob(answered) / UNIT)
            num_tokens += answered.item.num_scored
            ticker.tick(num_tokens)
    nats = -num_units * UNIT
    return Report(
        metrics={
            "bits_per_byte": nats / math.log(2) / reader.num_bytes,
            "token_perplexity": math.exp(min(nats / num_tokens, 700.0)),  # beyond, a float has no room
        },
        counts={"num_documents": reader.num_documents, "num_tokens": num_tokens, "num_bytes": reader.num_bytes},
        settings={"window": size, "stride": stride, "limit": limit},
    )


def window_and_stride(task: Task) -> tuple[int, int]:
    """Both in tokens, defaults filled in; the engine keeps one token of the context for itself."""
    largest = task.version.engine.max_model_len - 1
    size = task.settings["window"] or largest
    if not 2 <= size <= largest:
        raise InvalidConfig(f"window has value {size}; this version reads 2 to {largest} tokens at once")
    stride = task.settings["stride"] or max(1, size // 2)
    if stride >= size:
        raise InvalidConfig(f"stride has value {stride}; expected less than the window of {size} tokens")
    return size, stride


class TokenReader:
    """Pieces of text become windows of tokens; counts what it has read. Owned by the thread that asks the engine."""

    def __init__(self, folder: Path, version: VersionConfig, limit: int | None) -> None:
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._first_id = _first_id(self._tokenizer, version)
        self._limit = math.inf if limit is None else limit
        self._num_tokens = 0
        self.num_documents = 0
        self.num_bytes = 0

    def windows(self, pieces: Iterable[Piece], size: int, stride: int) -> Iterator[Window]:
        """Windows over each document, up to the limit."""
        queue: WindowQueue | None = None
        for piece in pieces:
            if piece.begins_document:
                yield from queue.rest() if queue else ()
                queue = WindowQueue(self._first_id, size, stride, piece.place)
                self.num_documents += 1
            assert queue is not None
            yield from queue.add(self._tokens(piece))
            if self._num_tokens >= self._limit:
                break
        yield from queue.rest() if queue else ()
        if self._num_tokens == 0:
            raise InvalidData("the data has no tokens; expected some text that this tokenizer can read")

    def _tokens(self, piece: Piece) -> list[int]:
        try:
            encoding = self._tokenizer.encode(piece.text, add_special_tokens=False)
        except Exception as error:  # the library raises plain Exception
            raise InvalidData(
                f"{piece.place}: the tokenizer cannot read the text ({error}); change the text"
            ) from error
        text, ids = piece.text, encoding.ids
        if len(ids) > (room := self._limit - self._num_tokens):
            ids = ids[: int(room)]
            text = text[: encoding.offsets[len(ids) - 1][1]]
        self._num_tokens += len(ids)
        self.num_bytes += len(text.encode())
        return ids


class WindowQueue:
    """The windows over one document whose tokens come bit by bit."""

    def __init__(self, first_id: int, size: int, stride: int, place: str) -> None:
        self._size = size
        self._num_context = size - stride
        self._place = place
        self._context = [first_id]
        self._new: list[int] = []

    def add(self, ids: list[int]) -> Iterator[Window]:
        self._new += ids
        while len(self._new) >= (room := self._size - len(self._context)):
            yield self._window(room)

    def rest(self) -> Iterator[Window]:
        if self._new:
            yield self._window(len(self._new))

    def _window(self, num_scored: int) -> Window:
        read = self._context + self._new[:num_scored]
        self._context, self._new = read[-self._num_context :], self._new[num_scored:]
        return Window(tuple(read), num_scored, self._place)


def _first_id(tokenizer: Tokenizer, version: VersionConfig) -> int:
    model = version.model
    known = [*tokenizer.encode("").ids[:1], model.bos_token_id, *model.eos_token_ids]
    found = next((token_id for token_id in known if token_id is not None), None)
    if found is None:
        raise InvalidVersion(
            "the version has neither a bos nor an eos token, so nothing can stand before a text's first token; "
            "export it from a checkpoint whose config names one"
        )
    return found


def _logprob(answered: Answered) -> float:
    """Of all scored tokens together; raises InvalidData for a token that the version rules out."""
    window, logprobs = answered.item, answered.answer.prompt_logprobs[-answered.item.num_scored :]
    if len(logprobs) != window.num_scored:
        raise EngineFailed(f"{window.place}: the engine gave {len(logprobs)} log probabilities of {window.num_scored}")
    total = math.fsum(logprobs)
    if not math.isfinite(total):
        place = next(i for i, logprob in enumerate(logprobs) if not math.isfinite(logprob))
        token_id = window.ids[place - window.num_scored]
        raise InvalidData(
            f"{window.place}: the text has token {token_id}, whose log probability is {logprobs[place]}: the version "
            "never writes it, so the text's perplexity is infinite; take it out of the text"
        )
    return total
