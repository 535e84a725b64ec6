"""The text of a sequence: decoded token by token, cut at the first stop string.

Text that could still turn out to be the beginning of a stop string is held back. Every token costs what its own text
costs, however long the text before it and however many the stop strings. Owned by the engine thread.

    text  "The import statement, combined with the fro"
           └──────── decided ─────────┘└─── held ────┘   while "the from" is a stop string
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from triton_backend.sampling_params import SamplingParams
from triton_backend.tokenizer import Tokenizer


class StopStrings:
    """Where stop strings are, or may be about to be, in text that grows."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._sorted = sorted(set(stops))
        self._longest = max(map(len, stops), default=0)
        self._first_chars = frozenset(stop[0] for stop in stops)
        self._by_last_char: dict[str, list[str]] = {}
        for stop in self._sorted:
            self._by_last_char.setdefault(stop[-1], []).append(stop)

    def find(self, text: str, num_seen: int) -> tuple[int, int] | None:
        """Begin and end of the stop string that begins first, of those that end after ``num_seen`` characters.

        Of two that begin at the same place it is the shorter: it was complete first. (vLLM takes whichever was listed
        first; that differs only where one token completes several.)
        """
        found = [
            (end - len(stop), end)
            for end in range(num_seen + 1, len(text) + 1)
            for stop in self._by_last_char.get(text[end - 1], ())
            if text.endswith(stop, 0, end)
        ]
        return min(found, default=None)

    def begin(self, text: str) -> int:
        """Where the longest end of ``text`` begins that may become a stop string; its length if none may."""
        for begin in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[begin] in self._first_chars and self._is_beginning(text[begin:]):
                return begin
        return len(text)

    def _is_beginning(self, text: str) -> bool:
        place = bisect_right(self._sorted, text)  # where anything longer that begins like this would be
        return place < len(self._sorted) and self._sorted[place].startswith(text)


class SequenceText:
    """The text of one sequence so far; keeps only what was not released yet."""

    def __init__(self, params: SamplingParams, tokenizer: Tokenizer) -> None:
        self._params = params
        self._stream = tokenizer.stream(params.skip_special_tokens)
        self._stops = StopStrings(params.stop) if params.stop else None
        self._num_certain = 0
        self._decided: list[str] = []
        self._held = ""
        self._seen = ""  # what was held, and pending in the stream, when stop strings were last looked for

    @property
    def num_chars(self) -> int:
        """How much can be read by now, certain or not, released or cut: the next token begins there."""
        return self._num_certain + len(self._stream.pending)

    def append(self, token_id: int, may_stop: bool) -> bool:
        """Add a token; True if a stop string is complete now: the text is cut there and takes no more tokens.

        Stop strings that were completed while ``may_stop`` was false stay in the text (min_tokens).
        """
        return self._extend(self._stream.append(token_id), may_stop)

    def finish(self, may_stop: bool) -> bool:
        """No more tokens follow: decode what was held; True if that completed a stop string."""
        return self._extend(self._stream.flush(), may_stop)

    def release(self, is_finished: bool) -> str:
        """Text that is certain and was not released before."""
        if is_finished:
            self._decided.append(self._held)
            self._held = ""
        text = "".join(self._decided)
        self._decided.clear()
        return text

    def _extend(self, new_text: str, may_stop: bool) -> bool:
        self._num_certain += len(new_text)
        if self._stops is None:
            self._decided.append(new_text)
            return False
        text = self._held + new_text
        # A stop string counts as soon as it can be read, as in generate(); it need not be certain that it can stay.
        readable = text + self._stream.pending
        num_seen = len(self._seen) if readable.startswith(self._seen) else len(self._held)
        found = self._stops.find(readable, num_seen) if may_stop else None
        if found:
            begin, end = found
            self._decided.append(readable[: end if self._params.include_stop_str_in_output else begin])
            self._held = ""
            return True
        begin = self._stops.begin(text)
        self._decided.append(text[:begin])
        self._held, self._seen = text[begin:], readable[begin:]
        return False


def text_of(token_ids: Sequence[int], is_end_token: bool, params: SamplingParams, tokenizer: Tokenizer) -> str:
    """The text of a finished sequence as a whole, by the same rules; ``is_end_token``: its last token ended it."""
    text = SequenceText(params, tokenizer)
    num_shown = len(token_ids) - (is_end_token and not params.include_stop_str_in_output)
    for count, token_id in enumerate(token_ids[:num_shown], 1):
        if text.append(token_id, may_stop=count > params.min_tokens):
            return text.release(is_finished=True)
    text.finish(may_stop=len(token_ids) > params.min_tokens)
    return text.release(is_finished=True)
