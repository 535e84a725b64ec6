"""From tokens to what the client sees: the responses of one request.

Deltas of a stream, or everything in one last response; text comes from ``sequence_text``. A stream whose last response
was not sent yet gets its next tokens together, so that sending never falls further behind than one response. Of
``best_of`` sequences and of beams only the best are returned, so these are told at the end. Owned by the engine thread.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from collections.abc import Sequence as Items
from itertools import accumulate
from typing import Any

from triton_backend.protocol import GenerateResponse, PromptToken, SequenceOutput, TokenLogprob
from triton_backend.sampling_params import SamplingParams
from triton_backend.sequence import FinishReason, RequestState, Sequence
from triton_backend.sequence_text import SequenceText, text_of
from triton_backend.tokenizer import Tokenizer


class RequestOutput:
    """Builds the responses of one request."""

    def __init__(self, state: RequestState, tokenizer: Tokenizer, stream_interval: int) -> None:
        self._state = state
        self._tokenizer = tokenizer
        self._stream_interval = stream_interval
        self._texts = {sequence: SequenceText(sequence.params, tokenizer) for sequence in state.sequences}
        self._num_sent_tokens = dict.fromkeys(state.sequences, 0)
        self._offsets: dict[Sequence, list[int]] = {sequence: [] for sequence in state.sequences}
        self._is_first = True

    def append(self, sequence: Sequence, is_end_token: bool) -> None:
        """Take the sequence's newest token; a completed stop string sets ``finish_reason``."""
        text, params = self._texts[sequence], sequence.params
        if sequence.logprobs:
            self._offsets[sequence].append(text.num_chars)
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

    def ends_beam(self, parent: int, token_id: int) -> bool:
        """Whether beam ``parent`` ends with one more token: by a stop string, or because its grammar is complete."""
        params, beam = self._state.params, self._state.beams[parent]
        if beam.grammar is not None:
            grammar = beam.grammar.copy()
            grammar.accept(token_id)
            if grammar.is_finished:
                return True
        if not params.stop or len(beam.output_ids) < params.min_tokens:
            return False
        text = self._tokenizer.decode([*beam.output_ids, token_id], params.skip_special_tokens)
        found = [stop for stop in params.stop if stop in text]
        if not found:
            return False
        # One that was complete before min_tokens stays in the text.
        before = self._tokenizer.decode(beam.output_ids, params.skip_special_tokens)
        return any(text.count(stop) > before.count(stop) for stop in found)

    def next_response(self, metrics: Mapping[str, Any]) -> GenerateResponse | None:
        """The response that is due now, if any: deltas of a stream, or the whole answer at the end."""
        state = self._state
        if not state.is_finished and not self._is_due():
            return None
        outputs = tuple(self._output(index, sequence) for index, sequence in enumerate(state.returned))
        has_news = any(output.text or output.token_ids for output in outputs)
        if not state.is_finished and not has_news:
            return None
        is_first, self._is_first = self._is_first, False
        tells_logprobs = is_first and bool(state.prompt_logprobs)
        tells_tokens = tells_logprobs or (is_first and state.params.return_prompt_tokens)
        return GenerateResponse(
            request_id=state.request.request_id,
            outputs=outputs,
            num_input_tokens=state.num_input_tokens,
            finished=state.is_finished,
            metrics=metrics if state.is_finished else {},
            prompt_logprobs=tuple(state.prompt_logprobs) if tells_logprobs else None,
            prompt_tokens=self._prompt_tokens() if tells_tokens else (),
        )

    def _prompt_tokens(self) -> tuple[PromptToken, ...]:
        """Of what was sent: of an encoder–decoder the source, unless log probabilities of the decoder's are told."""
        state = self._state
        ids = state.lead.prompt_ids if state.prompt_logprobs else state.source_ids or state.lead.prompt_ids
        return prompt_tokens(ids, state.params, self._tokenizer)

    def _is_due(self) -> bool:
        if not self._state.request.stream or self._state.params.is_beam:
            return False
        num_new = max(len(sequence.output_ids) - sent for sequence, sent in self._num_sent_tokens.items())
        return self._is_first or (num_new >= self._stream_interval and not self._state.sink.is_behind())

    def _output(self, index: int, sequence: Sequence) -> SequenceOutput:
        sent = self._num_sent_tokens.get(sequence, 0)
        self._num_sent_tokens[sequence] = len(sequence.output_ids)
        return SequenceOutput(
            index=index,
            text=self._text(sequence),
            token_ids=tuple(sequence.output_ids[sent:]),
            finish_reason=sequence.finish_reason.value if sequence.finish_reason else None,
            cumulative_logprob=sequence.cumulative_logprob,
            logprobs=self._logprobs(sequence, sent),
            score=sequence.score,
        )

    def _logprobs(self, sequence: Sequence, sent: int) -> tuple[tuple[TokenLogprob, ...], ...]:
        """Of the tokens behind the first ``sent``, with the place where each begins in the text."""
        if self._state.params.is_beam:
            texts = texts_of(sequence.output_ids, sequence.params, self._tokenizer)
            offsets = [0, *accumulate(map(len, texts))]
        else:
            offsets = self._offsets[sequence]
        return tuple(
            (dataclasses.replace(chosen, text_offset=offset), *others)
            for (chosen, *others), offset in zip(sequence.logprobs[sent:], offsets[sent:], strict=False)
        )

    def _text(self, sequence: Sequence) -> str:
        if self._state.params.is_beam:
            return text_of(sequence.output_ids, sequence.is_at_end_token, sequence.params, self._tokenizer)
        return self._texts[sequence].release(sequence.is_finished)


def prompt_tokens(ids: Items[int], params: SamplingParams, tokenizer: Tokenizer) -> tuple[PromptToken, ...]:
    """Every token of a prompt with the text that it adds."""
    pairs = zip(ids, texts_of(ids, params, tokenizer), strict=True)
    return tuple(PromptToken(token_id, tokenizer.token_text(token_id), text) for token_id, text in pairs)


def texts_of(token_ids: Items[int], params: SamplingParams, tokenizer: Tokenizer) -> list[str]:
    """What each token adds to the text that all of them make; a token that ends within a character adds nothing.

    A character belongs to the token that completes it, though it may be certain only after the next one.
    """
    stream = tokenizer.stream(params.skip_special_tokens)
    texts, read = [], ""
    for token_id in token_ids:
        readable = stream.append(token_id) + stream.pending
        if not readable.startswith(read):
            return _certain_texts(token_ids, params, tokenizer)
        texts.append(readable[len(read) :])
        read = stream.pending
    rest = stream.flush()
    if not rest.startswith(read):
        return _certain_texts(token_ids, params, tokenizer)
    return [*texts[:-1], *(text + rest[len(read) :] for text in texts[-1:])]


def _certain_texts(token_ids: Items[int], params: SamplingParams, tokenizer: Tokenizer) -> list[str]:
    """The same where what could be read turned out to be something else: bytes that make no character."""
    stream = tokenizer.stream(params.skip_special_tokens)
    texts = [stream.append(token_id) for token_id in token_ids]
    return [*texts[:-1], *(text + stream.flush() for text in texts[-1:])]
