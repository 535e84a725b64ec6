"""State of requests while they are inside the engine; everything here is owned by the engine thread.

A ``RequestState`` is one request with its n ``Sequence`` objects. A sequence is one text in the making: the shared
prompt, its own output tokens, and the cache row that holds their keys and values. Standard library only; no tensors.

    prompt_ids                      output_ids
    ├───────────────────────────────┼──────────────┤
    0        num_computed ──►       P             P+n     the last output token is not computed yet

For an encoder–decoder what the client sent is ``source_ids``, and ``prompt_ids`` the decoder's own first token.
"""

from __future__ import annotations

import enum
import random
from dataclasses import dataclass, field
from typing import Protocol

from triton_backend.protocol import GenerateRequest, GenerateResponse, TokenLogprob
from triton_backend.sampling_params import SamplingParams


class ResponseSink(Protocol):
    """Where the responses of one request go. ``is_cancelled`` is never called after the last ``send``."""

    def send(self, response: GenerateResponse) -> None: ...

    def is_cancelled(self) -> bool: ...


class SequenceStatus(enum.Enum):
    WAITING = "waiting"
    PREFILLING = "prefilling"
    RUNNING = "running"
    FINISHED = "finished"


class FinishReason(enum.Enum):
    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True)
class SampledToken:
    """One chosen token; ``logprobs`` (the chosen token first) only if the request asked for them."""

    token_id: int
    logprobs: tuple[TokenLogprob, ...] = ()


class Sequence:
    """One text being generated. ``state`` is the request that it belongs to."""

    state: RequestState

    def __init__(self, index: int, prompt_ids: tuple[int, ...], params: SamplingParams) -> None:
        self.index = index
        self.prompt_ids = prompt_ids
        self.params = params
        self.output_ids: list[int] = []
        self.logprobs: list[tuple[TokenLogprob, ...]] = []
        self.cumulative_logprob = 0.0
        self.status = SequenceStatus.WAITING
        self.finish_reason: FinishReason | None = None
        self.row = -1
        self.num_computed = 0
        # A string seed is hashed with sha512 by `random`, so neighbouring seeds and indices give unrelated streams.
        self.rng = random.Random(None if params.seed is None else f"{params.seed}/{index}")

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def num_prefill_tokens_left(self) -> int:
        return len(self.prompt_ids) - self.num_computed

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    def append(self, token: SampledToken) -> None:
        self.output_ids.append(token.token_id)
        if token.logprobs:
            self.logprobs.append(token.logprobs)
            self.cumulative_logprob += token.logprobs[0].logprob


@dataclass(eq=False)
class RequestState:
    """One request inside the engine. Times are ``time.monotonic`` seconds; 0.0 until they happened.

    ``source_ids`` are for the encoder, which reads them whole before the prompt is computed; empty for a model without.
    """

    request: GenerateRequest
    sequences: tuple[Sequence, ...]
    sink: ResponseSink
    arrived_s: float
    source_ids: tuple[int, ...] = ()
    scheduled_s: float = 0.0
    first_token_s: float = 0.0
    last_token_s: float = 0.0
    deadline_s: float = field(default=float("inf"))

    @classmethod
    def create(
        cls,
        request: GenerateRequest,
        prompt_ids: tuple[int, ...],
        sink: ResponseSink,
        now_s: float,
        source_ids: tuple[int, ...] = (),
    ) -> RequestState:
        params = request.params
        sequences = tuple(Sequence(index, prompt_ids, params) for index in range(params.n))
        deadline_s = now_s + params.timeout_ms / 1000 if params.timeout_ms else float("inf")
        state = cls(request, sequences, sink, arrived_s=now_s, source_ids=source_ids, deadline_s=deadline_s)
        for sequence in sequences:
            sequence.state = state
        return state

    @property
    def lead(self) -> Sequence:
        """The sequence that prefills the prompt; the others are forked from its row."""
        return self.sequences[0]

    @property
    def num_prompt_tokens(self) -> int:
        return self.lead.num_prompt_tokens

    @property
    def num_input_tokens(self) -> int:
        """Length of what the client sent."""
        return len(self.source_ids) or self.num_prompt_tokens

    @property
    def is_finished(self) -> bool:
        return all(sequence.is_finished for sequence in self.sequences)
