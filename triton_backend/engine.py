"""The engine: one thread that owns scheduler, cache, runner and sampler, and turns requests into responses.

Other threads only ``submit`` and ``stop``, which put messages into the inbox; responses leave through each request's
sink. ``step`` reads aloud: schedule → run → sample → decode text → update. Text is decoded before the update, so a
stop string ends its sequence in the step that completed it.

    execute() ──submit──► inbox ──► engine thread ──► sink.send() ──► responder thread ──► Triton
"""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import dataclass
from typing import Any

import structlog

from triton_backend.config import VersionConfig
from triton_backend.errors import EngineError, EngineStopped, InvalidRequest, QueueFull, RequestCancelled
from triton_backend.metrics import EngineMetrics, MetricSink, NoMetrics
from triton_backend.model_runner import DecodeToken, ModelRunner
from triton_backend.output_processor import RequestOutput
from triton_backend.protocol import GenerateRequest, GenerateResponse
from triton_backend.sampler import Sampler
from triton_backend.scheduler import Scheduler, StepPlan
from triton_backend.sequence import FinishReason, RequestState, ResponseSink, SampledToken, Sequence
from triton_backend.tokenizer import Tokenizer

log = structlog.get_logger()

MAX_PROBE_TOKENS = 16
# is_cancelled() costs 25 µs a call, so requests that hold rows are asked often and waiting ones seldom.
CANCEL_POLL_S = 0.025
CANCEL_POLL_WAITING_S = 0.25


@dataclass(frozen=True)
class Submit:
    state: RequestState


@dataclass(frozen=True)
class Stop:
    pass


class Engine:
    """Generates text for many requests at once."""

    def __init__(
        self,
        config: VersionConfig,
        runner: ModelRunner,
        tokenizer: Tokenizer,
        metric_sink: MetricSink | None = None,
        digest: str = "",
    ) -> None:
        self._config = config
        self._runner = runner
        self._tokenizer = tokenizer
        self._digest = digest
        self._scheduler = Scheduler(config.engine)
        self._sampler = Sampler(config.model, tokenizer)
        self._metrics = EngineMetrics(
            metric_sink or NoMetrics(), config.engine.max_num_seqs, config.engine.max_model_len
        )
        self._outputs: dict[RequestState, RequestOutput] = {}
        self._inbox: queue.SimpleQueue[Submit | Stop] = queue.SimpleQueue()
        self._is_stopping = False
        self._next_poll_s = 0.0
        self._next_poll_waiting_s = 0.0
        self._started_s = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # Any thread -------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def submit(self, request: GenerateRequest, sink: ResponseSink) -> None:
        """Tokenize, check and queue a request; raises InvalidRequest. Everything later arrives at ``sink``."""
        input_ids = request.input_ids if request.text is None else self._tokenizer.encode(request.text)
        self._check(request, input_ids)
        self._inbox.put(Submit(self._state_of(request, input_ids, sink)))

    def stop(self) -> None:
        """End the engine thread; requests that are still inside get an error."""
        self._inbox.put(Stop())
        self._thread.join()

    def _state_of(self, request: GenerateRequest, input_ids: tuple[int, ...], sink: ResponseSink) -> RequestState:
        """What the client sent is the decoder's prompt, or the encoder's source if there is an encoder."""
        model, now_s = self._config.model, time.monotonic()
        if model.kind != "encoder_decoder":
            return RequestState.create(request, input_ids, sink, now_s)
        assert model.decoder_start_token_id is not None
        return RequestState.create(request, (model.decoder_start_token_id,), sink, now_s, source_ids=input_ids)

    def _check(self, request: GenerateRequest, input_ids: tuple[int, ...]) -> None:
        model, num_rows = self._config.model, self._config.engine.max_num_seqs
        if not input_ids:
            raise InvalidRequest("the prompt is empty; expected at least one token of text_input or input_ids")
        self._check_length(len(input_ids))
        if request.params.n > num_rows:
            raise InvalidRequest(f"n has value {request.params.n}; this model runs at most {num_rows} sequences")
        vocab_size = model.source_vocab_size or model.vocab_size
        bad = next((i for i in input_ids if not 0 <= i < vocab_size), None)
        if bad is not None:
            raise InvalidRequest(f"input_ids has value {bad}; expected token ids from 0 to {vocab_size - 1}")
        if request.health_probe and len(input_ids) > MAX_PROBE_TOKENS:
            raise InvalidRequest(
                f"health_probe has a prompt of {len(input_ids)} tokens; expected at most {MAX_PROBE_TOKENS}"
            )

    def _check_length(self, num_tokens: int) -> None:
        limit, source_limit = self._config.engine.max_model_len, self._config.engine.max_source_len
        if self._config.model.kind == "encoder_decoder":
            if num_tokens > source_limit:
                raise InvalidRequest(
                    f"the source text has {num_tokens} tokens, but the model reads at most {source_limit} tokens "
                    "(max_source_len); shorten the text"
                )
        elif num_tokens >= limit:
            raise InvalidRequest(
                f"the prompt has {num_tokens} tokens, but the model's context is {limit} tokens and must hold at "
                "least one new token; shorten the prompt"
            )

    # Engine thread ----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._is_stopping:
            try:
                self._receive()
                self._drop_lost_requests()
                if self._scheduler.has_work and not self._is_stopping:
                    self.step()
            except Exception as error:  # a failed step must not take later requests with it
                log.exception("step_failed")
                self._fail_all(EngineError(f"the engine failed while computing this request: {error}"))
        self._fail_all(EngineStopped("the model is being unloaded; try again"))

    def step(self) -> None:
        """Advance every scheduled sequence by one chunk or one token."""
        plan = self._scheduler.schedule()
        sequences = self._run_plan(plan)
        tokens = self._sampler.sample(sequences, self._runner.outputs)
        self._decode_text(sequences, tokens)
        self._update(plan, sequences)

    def _run_plan(self, plan: StepPlan) -> list[Sequence]:
        """Run the graph; returns the sequences whose next token can be chosen now."""
        for move in plan.moves:
            self._runner.copy_row(move.source, move.target, move.sequence.num_computed)
            self._runner.clear_row(move.source)
        sequences = list(plan.decodes)
        if plan.decodes:
            self._runner.decode(
                (DecodeToken(s.row, s.output_ids[-1], s.num_tokens - 1) for s in plan.decodes),
                want_logits=any(map(self._sampler.needs_logits, plan.decodes)),
            )
            for sequence in plan.decodes:
                sequence.num_computed = sequence.num_tokens
        for chunk in plan.prefills:
            lead = chunk.state.lead
            chunk.state.scheduled_s = chunk.state.scheduled_s or time.monotonic()
            if chunk.state.source_ids:
                self._runner.encode(lead.row, chunk.state.source_ids)
            ids = lead.prompt_ids[chunk.start : chunk.start + chunk.length]
            self._runner.prefill(lead.row, ids, chunk.start, chunk.is_last and self._sampler.needs_logits(lead))
            if chunk.is_last:
                self._fork(chunk.state)
                sequences.extend(chunk.state.sequences)
        return sequences

    def _fork(self, state: RequestState) -> None:
        """Give every other sequence of the request its copy of the computed prompt."""
        self._scheduler.finish_prefill(state)
        for sequence in state.sequences[1:]:
            self._runner.copy_row(state.lead.row, sequence.row, state.num_prompt_tokens)

    def _decode_text(self, sequences: list[Sequence], tokens: list[SampledToken]) -> None:
        for sequence, token in zip(sequences, tokens, strict=True):
            sequence.append(token)
            is_end_token = self._is_end_token(sequence)
            is_last = (
                len(sequence.output_ids) >= sequence.params.max_tokens
                or sequence.num_tokens >= self._config.engine.max_model_len
            )
            # An end that was forced because there is no room left is no end of the text.
            if is_end_token and not (is_last and token.token_id == self._config.model.forced_eos_token_id):
                sequence.finish_reason = FinishReason.STOP
            elif is_last:
                sequence.finish_reason = FinishReason.LENGTH
            self._outputs[sequence.state].append(sequence, is_end_token)

    def _is_end_token(self, sequence: Sequence) -> bool:
        token_id, params = sequence.output_ids[-1], sequence.params
        is_eos = not params.ignore_eos and token_id in self._config.model.eos_token_ids
        return is_eos or token_id in params.stop_token_ids

    def _update(self, plan: StepPlan, sequences: list[Sequence]) -> None:
        """Free the rows of finished sequences, send what is due, and forget finished requests."""
        now_s = time.monotonic()
        for sequence in sequences:
            if sequence.is_finished and sequence.row >= 0:
                self._runner.clear_row(sequence.row)
                self._scheduler.release(sequence)
        for state in dict.fromkeys(sequence.state for sequence in sequences):
            state.first_token_s = state.first_token_s or now_s
            state.last_token_s = now_s
            response = self._outputs[state].next_response(self._request_metrics(state) if state.is_finished else {})
            if state.is_finished:
                self._forget(state)
                self._metrics.request_finished(state)
            if response is not None:
                state.sink.send(response)
        num_input_tokens = sum(chunk.state.num_input_tokens for chunk in plan.prefills if chunk.is_last)
        self._metrics.count_tokens(num_input_tokens, len(sequences))
        self._update_load()

    def _receive(self) -> None:
        """Take every message from the inbox; sleeps while there is nothing to do."""
        is_idle = not self._scheduler.has_work
        while True:
            try:
                message = self._inbox.get(block=is_idle)
            except queue.Empty:
                return
            is_idle = False
            if isinstance(message, Stop):
                self._is_stopping = True
            elif self._scheduler.is_full and not message.state.request.health_probe:
                waiting = self._scheduler.num_waiting
                self._send_error(message.state, QueueFull(
                    f"{waiting} requests are waiting already (max_queue_size = {self._config.engine.max_queue_size}); "
                    "try again later"
                ))  # fmt: skip
            else:
                state = message.state
                self._scheduler.add(state)
                self._outputs[state] = RequestOutput(state, self._tokenizer, self._config.engine.stream_interval)

    def _drop_lost_requests(self) -> None:
        """Take out requests whose client left or whose deadline passed, at whatever stage they are."""
        now_s = time.monotonic()
        if now_s < self._next_poll_s:
            return
        self._next_poll_s = now_s + CANCEL_POLL_S
        polls_waiting = now_s >= self._next_poll_waiting_s
        if polls_waiting:
            self._next_poll_waiting_s = now_s + CANCEL_POLL_WAITING_S
        for state in tuple(self._scheduler.states()):
            is_waiting = state.lead.row < 0 and not state.lead.is_finished
            if now_s >= state.deadline_s:
                self._abort(state, RequestCancelled(f"timeout_ms = {state.request.params.timeout_ms} has passed"))
            elif (polls_waiting or not is_waiting) and state.sink.is_cancelled():
                self._abort(state, RequestCancelled("the client cancelled the request"))

    def _abort(self, state: RequestState, error: EngineError) -> None:
        for sequence in state.sequences:
            if sequence.row >= 0:
                self._runner.clear_row(sequence.row)
        self._forget(state)
        self._metrics.request_aborted(state)
        self._send_error(state, error)
        self._update_load()

    def _fail_all(self, error: EngineError) -> None:
        for state in tuple(self._scheduler.states()):
            self._abort(state, error)
        while not self._inbox.empty():
            message = self._inbox.get()
            if isinstance(message, Submit):
                self._send_error(message.state, error)

    def _forget(self, state: RequestState) -> None:
        self._scheduler.remove(state)
        del self._outputs[state]

    def _send_error(self, state: RequestState, error: EngineError) -> None:
        state.sink.send(GenerateResponse(state.request.request_id, finished=True, error=str(error)))

    def _update_load(self) -> None:
        self._metrics.update_load(self._scheduler.num_running, self._scheduler.num_waiting, self._scheduler.cache_usage)

    def _request_metrics(self, state: RequestState) -> dict[str, Any]:
        return {
            "queue_s": round(state.scheduled_s - state.arrived_s, 6),
            "prefill_s": round(state.first_token_s - state.scheduled_s, 6),
            "decode_s": round(state.last_token_s - state.first_token_s, 6),
            "cached_tokens": 0,
            "engine_uptime_s": round(time.monotonic() - self._started_s, 3),
            "digest": self._digest,
        }
