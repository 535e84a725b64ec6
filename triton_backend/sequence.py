"""State of requests while they are inside the engine; everything here is owned by the engine thread.

A ``RequestState`` is one request with its ``Sequence`` objects, each of which holds one cache row. A sequence is one
text in the making: the shared prompt, its own output tokens, and the row with their keys and values. While beams are
searched, ``beams`` lists the sequences that are beams now, best first, and what is found becomes ``hypotheses``.
Standard library only; no tensors.

    prompt_ids                      output_ids
    ├───────────────────────────────┼──────────────┤
    0        num_computed ──►       P             P+n     the last output token is not computed yet

For an encoder–decoder what the client sent is ``source_ids``, and ``prompt_ids`` the decoder's own first token.
"""

from __future__ import annotations

import enum
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from triton_backend.protocol import GenerateRequest, GenerateResponse, TokenLogprob
from triton_backend.sampling_params import SamplingParams

if TYPE_CHECKING:
    from triton_backend.adapter_manager import AdapterRef
    from triton_backend.beam_search import BeamSearch
    from triton_backend.grammars import GrammarState


class ResponseSink(Protocol):
    """Where the responses of one request go. ``is_cancelled`` is never called after the last ``send``."""

    def send(self, response: GenerateResponse) -> None: ...

    def is_cancelled(self) -> bool: ...

    def is_behind(self) -> bool:
        """Whether an earlier response still waits to be sent; what comes meanwhile is sent together."""
        return False


class FinishReason(enum.Enum):
    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True)
class SampledToken:
    """One chosen token; ``logprob`` and ``logprobs`` (the chosen token first) only if the request needs them.

    One that the model forces (``is_forced``) is not part of what a grammar describes.
    """

    token_id: int
    logprobs: tuple[TokenLogprob, ...] = ()
    is_forced: bool = False

    @property
    def logprob(self) -> float:
        return self.logprobs[0].logprob if self.logprobs else 0.0


class Sequence:
    """One text being generated. ``state`` is the request that it belongs to.

    ``num_computed`` tokens of it lie in cache row ``row``; -1 is no row. ``grammar`` restricts what may come next.
    """

    state: RequestState

    def __init__(
        self,
        index: int,
        prompt_ids: tuple[int, ...],
        params: SamplingParams,
        seed: int = 0,
        grammar: GrammarState | None = None,
    ) -> None:
        self.index = index
        self.prompt_ids = prompt_ids
        self.params = params
        self.grammar = grammar
        self.output_ids: list[int] = []
        self.logprobs: list[tuple[TokenLogprob, ...]] = []
        self.cumulative_logprob = 0.0
        self.score: float | None = None
        self.is_at_end_token = False
        self.finish_reason: FinishReason | None = None
        self.row = -1
        self.num_computed = 0
        # A string seed is hashed with sha512 by `random`, so neighbouring seeds and indices give unrelated streams.
        self.rng = random.Random(f"{seed}/{index}")

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

    def computed_ids(self) -> tuple[int, ...]:
        """The tokens whose keys and values lie in the row."""
        num_prompt = len(self.prompt_ids)
        if self.num_computed <= num_prompt:
            return self.prompt_ids[: self.num_computed]
        return (*self.prompt_ids, *self.output_ids[: self.num_computed - num_prompt])

    def become(self, other: Sequence) -> None:
        """Continue as a copy of ``other``, in this sequence's own row."""
        self.output_ids = list(other.output_ids)
        self.logprobs = list(other.logprobs)
        self.cumulative_logprob = other.cumulative_logprob
        self.num_computed = other.num_computed
        self.grammar = other.grammar.copy() if other.grammar else None

    def append(self, token: SampledToken) -> None:
        self.output_ids.append(token.token_id)
        self.cumulative_logprob += token.logprob
        if token.logprobs:
            self.logprobs.append(token.logprobs)
        if self.grammar is not None and not token.is_forced:
            self.grammar.accept(token.token_id)


@dataclass(eq=False)
class RequestState:
    """One request inside the engine. Times are ``time.monotonic`` seconds; 0.0 until they happened.

    ``source_ids`` are for the encoder, which reads them whole before the prompt is computed; empty for a model without.
    ``seed`` is the client's, or drawn. ``end_token_ids`` end a sequence.
    ``arrival`` is the request's place in the order of arrival, ``num_overtaken`` how often a later one started first.
    """

    request: GenerateRequest
    sequences: tuple[Sequence, ...]
    sink: ResponseSink
    arrived_s: float
    seed: int
    source_ids: tuple[int, ...] = ()
    adapter: AdapterRef | None = None
    end_token_ids: frozenset[int] = frozenset()
    search: BeamSearch | None = None
    beams: list[Sequence] = field(default_factory=list)
    hypotheses: tuple[Sequence, ...] = ()
    prompt_logprobs: list[tuple[TokenLogprob, ...] | None] = field(default_factory=list)
    arrival: int = -1
    has_started: bool = False
    num_overtaken: int = 0
    num_preemptions: int = 0
    num_cached_tokens: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
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
        grammar: GrammarState | None = None,
        adapter: AdapterRef | None = None,
        end_token_ids: frozenset[int] = frozenset(),
    ) -> RequestState:
        params = request.params
        seed = random.getrandbits(63) if params.seed is None else params.seed
        sequences = tuple(
            Sequence(index, prompt_ids, params, seed, grammar.copy() if grammar else None)
            for index in range(params.num_sequences)
        )
        deadline_s = now_s + params.timeout_ms / 1000 if params.timeout_ms else float("inf")
        state = cls(request, sequences, sink, now_s, seed, source_ids, adapter, end_token_ids, deadline_s=deadline_s)
        for sequence in sequences:
            sequence.state = state
        if params.prompt_logprobs is not None:
            state.prompt_logprobs.append(None)  # nothing predicts the first token
        return state

    @property
    def params(self) -> SamplingParams:
        return self.request.params

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
    def num_output_tokens(self) -> int:
        return sum(len(sequence.output_ids) for sequence in self.returned)

    @property
    def decoding(self) -> tuple[Sequence, ...]:
        """Sequences that get a token in every step, once the prompt is computed."""
        if self.params.is_beam:
            return tuple(self.beams)
        return tuple(sequence for sequence in self.sequences if not sequence.is_finished)

    @property
    def is_finished(self) -> bool:
        if self.search is not None:
            return self.search.is_finished
        return all(sequence.is_finished for sequence in self.sequences)

    @property
    def returned(self) -> tuple[Sequence, ...]:
        """What the client gets: the best hypotheses, the ``n`` best of ``best_of``, or every sequence."""
        if self.params.is_beam:
            return self.hypotheses
        if len(self.sequences) == self.params.n:
            return self.sequences
        best = sorted(self.sequences, key=lambda sequence: -sequence.cumulative_logprob)
        return tuple(best[: self.params.n])
