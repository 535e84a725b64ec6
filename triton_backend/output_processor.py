"""From tokens to what the client sees: text, stop strings, and the responses of one request.

A ``SequenceText`` decodes one sequence and looks for stop strings; text that could still turn out to be the beginning
of a stop string is held back. A ``RequestOutput`` cuts deltas (or keeps everything for one last response). Owned by
the engine thread.

    text  "The import statement, combined with the fro"
           └──────── released ────────┘└─ held back ─┘   while "from" is a stop string
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from triton_backend.protocol import GenerateResponse, SequenceOutput
from triton_backend.sequence import FinishReason, RequestState, Sequence
from triton_backend.tokenizer import Tokenizer


class SequenceText:
    """The text of one sequence so far."""

    def __init__(self, sequence: Sequence, tokenizer: Tokenizer) -> None:
        self._params = sequence.params
        self._stream = tokenizer.stream(sequence.params.skip_special_tokens)
        self._longest_stop = max((len(stop) for stop in sequence.params.stop), default=0)
        self.text = ""
        self.num_released_chars = 0

    def append(self, token_id: int, may_stop: bool) -> bool:
        """Add a token; True if a stop string is complete now (and the text is cut there)."""
        return self._extend(self._stream.append(token_id), may_stop)

    def finish(self, may_stop: bool) -> bool:
        """No more tokens follow: decode what was held; True if that completed a stop string."""
        return self._extend(self._stream.flush(), may_stop)

    def release(self, is_finished: bool) -> str:
        """Text that is certain and was not released before."""
        end = len(self.text) - (0 if is_finished else self._held_back())
        text = self.text[self.num_released_chars : end]
        self.num_released_chars += len(text)
        return text

    def _extend(self, new_text: str, may_stop: bool) -> bool:
        old_length = len(self.text)
        self.text += new_text
        if not new_text or not self._params.stop or not may_stop:
            return False
        # A stop string that ends in the new text begins at most longest_stop − 1 characters before it.
        search_from = max(0, old_length - self._longest_stop + 1)
        found = [(position, stop) for stop in self._params.stop if (position := self.text.find(stop, search_from)) >= 0]
        if not found:
            return False
        position, stop = min(found)
        self.text = self.text[: position + (len(stop) if self._params.include_stop_str_in_output else 0)]
        return True

    def _held_back(self) -> int:
        """Length of the longest end of the text that is a proper beginning of a stop string."""
        for length in range(min(self._longest_stop - 1, len(self.text)), 0, -1):
            tail = self.text[-length:]
            if any(stop.startswith(tail) for stop in self._params.stop):
                return length
        return 0


class RequestOutput:
    """Builds the responses of one request."""

    def __init__(self, state: RequestState, tokenizer: Tokenizer, stream_interval: int) -> None:
        self._state = state
        self._stream_interval = stream_interval
        self._texts = [SequenceText(sequence, tokenizer) for sequence in state.sequences]
        self._num_sent_tokens = [0] * len(state.sequences)
        self._is_first = True

    def append(self, sequence: Sequence, is_end_token: bool) -> None:
        """Take the sequence's newest token; a completed stop string sets ``finish_reason``."""
        text, params = self._texts[sequence.index], sequence.params
        may_stop = len(sequence.output_ids) > params.min_tokens
        # The token that ended the sequence is not part of the text, as with generate(skip_special_tokens=True).
        if not is_end_token or params.include_stop_str_in_output:
            stopped = text.append(sequence.output_ids[-1], may_stop)
        else:
            stopped = False
        if sequence.is_finished and not stopped:
            stopped = text.finish(may_stop)
        if stopped:
            sequence.finish_reason = FinishReason.STOP

    def next_response(self, metrics: Mapping[str, Any]) -> GenerateResponse | None:
        """The response that is due now, if any: deltas of a stream, or the whole answer at the end."""
        state = self._state
        if not state.is_finished and not self._is_due():
            return None
        outputs = tuple(self._output(sequence) for sequence in state.sequences)
        has_news = any(output.text or output.token_ids for output in outputs)
        if not state.is_finished and not has_news:
            return None
        self._is_first = False
        return GenerateResponse(
            request_id=state.request.request_id,
            outputs=outputs,
            num_input_tokens=state.num_input_tokens,
            finished=state.is_finished,
            metrics=metrics if state.is_finished else {},
        )

    def _is_due(self) -> bool:
        if not self._state.request.stream:
            return False
        num_new = max(
            len(sequence.output_ids) - sent
            for sequence, sent in zip(self._state.sequences, self._num_sent_tokens, strict=True)
        )
        return self._is_first or num_new >= self._stream_interval

    def _output(self, sequence: Sequence) -> SequenceOutput:
        sent = self._num_sent_tokens[sequence.index]
        self._num_sent_tokens[sequence.index] = len(sequence.output_ids)
        return SequenceOutput(
            index=sequence.index,
            text=self._texts[sequence.index].release(sequence.is_finished),
            token_ids=tuple(sequence.output_ids[sent:]),
            finish_reason=sequence.finish_reason.value if sequence.finish_reason else None,
            cumulative_logprob=sequence.cumulative_logprob,
            logprobs=tuple(sequence.logprobs[sent:]),
        )
