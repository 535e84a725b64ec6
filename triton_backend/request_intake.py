"""From a parsed request to one that the engine can run: tokens, limits, grammar, adapter, beams.

Everything here runs on the thread that submits, so that neither a long prompt nor a hard grammar holds up the engine.
What can never succeed is refused with InvalidRequest.
"""

from __future__ import annotations

from collections.abc import Iterable

from triton_backend.adapter_manager import AdapterRef
from triton_backend.adapter_store import AdapterStore
from triton_backend.beam_search import BeamSearch
from triton_backend.config import VersionConfig
from triton_backend.errors import InvalidRequest
from triton_backend.grammars import GrammarCompiler
from triton_backend.protocol import GenerateRequest
from triton_backend.sequence import RequestState, ResponseSink
from triton_backend.tokenizer import Tokenizer

MAX_PROBE_TOKENS = 16
QUICK_CHARS = 50_000
"""A longer text takes 10 ms and more to be tokenized, a new grammar up to seconds to be compiled."""
MAX_END_TOKENS_OF_BEAMS = 64


class RequestIntake:
    """Safe to use from any thread; keeps nothing of a request."""

    def __init__(
        self, config: VersionConfig, tokenizer: Tokenizer, grammars: GrammarCompiler, adapters: AdapterStore
    ) -> None:
        self._model = config.model
        self._engine = config.engine
        self._tokenizer = tokenizer
        self._grammars = grammars
        self._adapters = adapters

    def is_quick(self, request: GenerateRequest) -> bool:
        grammar = request.params.grammar
        return len(request.text or "") <= QUICK_CHARS and (grammar is None or self._grammars.has(grammar))

    def prepare(self, request: GenerateRequest, sink: ResponseSink, arrived_s: float) -> RequestState:
        """Raises InvalidRequest naming what is wrong, its value and what is allowed."""
        params, model = request.params, self._model
        input_ids = self._input_ids(request)
        self._check_input(request, input_ids)
        prompt_ids = input_ids
        source_ids: tuple[int, ...] = ()
        if model.kind == "encoder_decoder":
            assert model.decoder_start_token_id is not None
            prompt_ids, source_ids = (model.decoder_start_token_id, *params.decoder_input_ids), input_ids
        self._check_prompt(request, prompt_ids)
        for word in params.bad_words:  # first on this thread: one that has no tokens must not fail a step
            self._tokenizer.encode_plain(word)
            self._tokenizer.encode_plain(f" {word}")
        state = RequestState.create(
            request,
            prompt_ids,
            sink,
            arrived_s,
            source_ids=source_ids,
            grammar=self._grammars.compile(params.grammar) if params.grammar else None,
            adapter=self._adapter(params.adapter),
            end_token_ids=self._end_token_ids(request),
        )
        if params.is_beam:
            state.search = BeamSearch(params, state.end_token_ids, self._max_new_tokens(request, prompt_ids))
        return state

    def _input_ids(self, request: GenerateRequest) -> tuple[int, ...]:
        params = request.params
        limit = self._input_limit(request)
        if request.text is None:
            ids = request.input_ids
        else:
            ids = self._tokenizer.encode(request.text, None if params.truncate_prompt_tokens else limit)
        if params.truncate_prompt_tokens is None:
            return ids
        num_kept = params.truncate_prompt_tokens
        return ids[-(limit if num_kept < 0 else num_kept) :]

    def _input_limit(self, request: GenerateRequest) -> int:
        """The longest input, in tokens, that leaves room for what is asked for."""
        if self._model.kind == "encoder_decoder":
            return self._engine.max_source_len
        num_new = request.params.max_tokens if request.params.truncate_prompt_tokens == -1 else 1
        return max(1, self._engine.max_model_len - num_new)

    def _check_input(self, request: GenerateRequest, input_ids: tuple[int, ...]) -> None:
        if not input_ids:
            raise InvalidRequest("the prompt is empty; expected at least one token of text_input or input_ids")
        if self._model.kind == "encoder_decoder" and len(input_ids) > self._engine.max_source_len:
            raise InvalidRequest(
                f"the source text has {len(input_ids)} tokens, but the model reads at most "
                f"{self._engine.max_source_len} tokens (max_source_len); shorten the text"
            )
        _check_ids("input_ids", input_ids, self._model.source_vocab_size or self._model.vocab_size)
        if request.health_probe and len(input_ids) > MAX_PROBE_TOKENS:
            raise InvalidRequest(
                f"health_probe has a prompt of {len(input_ids)} tokens; expected at most {MAX_PROBE_TOKENS}"
            )

    def _check_prompt(self, request: GenerateRequest, prompt_ids: tuple[int, ...]) -> None:
        params, limit, num_rows = request.params, self._engine.max_model_len, self._engine.max_num_seqs
        _check_ids("allowed_token_ids", params.allowed_token_ids or (), self._model.vocab_size)
        _check_ids("logit_bias", (token_id for token_id, _ in params.logit_bias), self._model.vocab_size)
        if params.decoder_input_ids and self._model.kind != "encoder_decoder":
            raise InvalidRequest("decoder_input_ids is given, but this model has no encoder; put them into the prompt")
        _check_ids("decoder_input_ids", params.decoder_input_ids, self._model.vocab_size)
        if params.prompt_logprobs is not None and self._model.kind == "encoder_decoder" and len(prompt_ids) == 1:
            raise InvalidRequest(
                f"prompt_logprobs has value {params.prompt_logprobs}, but the source text of an encoder–decoder has no "
                "log probabilities, so it cannot be echoed with them; leave it out, or give decoder_input_ids"
            )
        if len(prompt_ids) >= limit:
            raise InvalidRequest(
                f"the prompt has {len(prompt_ids)} tokens, but the model's context is {limit} tokens and must hold at "
                "least one new token; shorten the prompt"
            )
        # The decoder's graph takes no more tokens at once than a source may have, one of padding included.
        if self._model.kind == "encoder_decoder" and len(prompt_ids) >= self._engine.max_source_len:
            raise InvalidRequest(
                f"decoder_input_ids has {len(params.decoder_input_ids)} tokens; this model takes at most "
                f"{self._engine.max_source_len - 2} (max_source_len - 2)"
            )
        if params.min_tokens > limit - len(prompt_ids):
            raise InvalidRequest(
                f"min_tokens has value {params.min_tokens}, but after a prompt of {len(prompt_ids)} tokens the model's "
                f"context of {limit} has room for {limit - len(prompt_ids)}"
            )
        if params.num_sequences > num_rows:
            name = "beam_width" if params.is_beam else "best_of" if params.best_of else "n"
            raise InvalidRequest(
                f"{name} has value {params.num_sequences}; this model runs at most {num_rows} sequences"
            )

    def _adapter(self, name: str | None) -> AdapterRef | None:
        if name is None:
            return None
        if self._model.lora is None:
            raise InvalidRequest(
                f"adapter has value {name!r:.140}, but this version has no slots for adapters; export it with "
                "--lora-slots"
            )
        return self._adapters.open(name)

    def _end_token_ids(self, request: GenerateRequest) -> frozenset[int]:
        params = request.params
        ids = frozenset(params.stop_token_ids) | frozenset(() if params.ignore_eos else self._model.eos_token_ids)
        ids = frozenset(i for i in ids if i < self._model.vocab_size)
        if params.is_beam and len(ids) > MAX_END_TOKENS_OF_BEAMS:
            raise InvalidRequest(
                f"stop_token_ids has {len(ids)} entries; a beam search, which looks at one more candidate for each, "
                f"takes at most {MAX_END_TOKENS_OF_BEAMS}"
            )
        return ids

    def _max_new_tokens(self, request: GenerateRequest, prompt_ids: tuple[int, ...]) -> int:
        return min(request.params.max_tokens, self._engine.max_model_len - len(prompt_ids))


def _check_ids(name: str, ids: Iterable[int], vocab_size: int) -> None:
    bad = next((i for i in ids if not 0 <= i < vocab_size), None)
    if bad is not None:
        raise InvalidRequest(f"{name} has value {bad}; expected token ids from 0 to {vocab_size - 1}")
