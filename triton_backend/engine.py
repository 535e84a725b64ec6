"""The engine: one thread that owns scheduler, cache, runner and sampler, and turns requests into responses.

Other threads only ``submit`` and ``stop``, which put messages into the inbox; responses leave through each request's
sink. ``step`` reads aloud: schedule → run → sample, or advance beams → update. Text is decoded with each token, before
the update, so a stop string ends its sequence in the step that completed it.

    execute() ──submit──► inbox ──► engine thread ──► sink.send() ──► responder thread ──► Triton
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import structlog

from triton_backend import beam_rows
from triton_backend.adapter_store import AdapterStore
from triton_backend.cache_manager import RowMove
from triton_backend.config import VersionConfig
from triton_backend.errors import EngineError, EngineStopped, InvalidRequest, QueueFull, RequestCancelled
from triton_backend.event_log import EventLog
from triton_backend.grammars import GrammarCompiler
from triton_backend.metrics import EngineMetrics, MetricSink, NoMetrics
from triton_backend.model_runner import DecodeToken, ModelRunner, SavedRow
from triton_backend.output_processor import RequestOutput
from triton_backend.protocol import GenerateRequest, GenerateResponse
from triton_backend.request_intake import RequestIntake
from triton_backend.sampler import Sampler
from triton_backend.scheduler import PrefillChunk, Scheduler, Start, StepPlan
from triton_backend.sequence import FinishReason, RequestState, ResponseSink, SampledToken, Sequence
from triton_backend.speculator import Speculator
from triton_backend.tokenizer import Tokenizer

log = structlog.get_logger()

# is_cancelled() costs 25 µs a call, so requests that hold rows are asked often and waiting ones seldom.
CANCEL_POLL_S = 0.025
CANCEL_POLL_WAITING_S = 0.25
LOGITS_BYTES = 32 << 20
"""Bound on the logits of one chunk whose every position is wanted."""


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
        adapters: AdapterStore,
        metric_sink: MetricSink | None = None,
        digest: str = "",
        events: EventLog | None = None,
    ) -> None:
        model, engine = config.model, config.engine
        self._config = config
        self._runner = runner
        self._tokenizer = tokenizer
        self._adapters = adapters
        self._digest = digest
        self._events = events or EventLog()
        self._intake = RequestIntake(config, tokenizer, GrammarCompiler(tokenizer, model), adapters)
        self._scheduler = Scheduler(
            engine,
            num_adapter_slots=model.lora.num_slots if model.lora else 0,
            max_logits_positions=max(2, LOGITS_BYTES // (4 * model.vocab_size)),
        )
        self._sampler = Sampler(model, tokenizer)
        self._speculator = Speculator(config, runner)
        self._metrics = EngineMetrics(metric_sink or NoMetrics(), engine.max_num_seqs, engine.max_model_len)
        self._outputs: dict[RequestState, RequestOutput] = {}
        self._saved: dict[Sequence, SavedRow] = {}
        self._inbox: queue.SimpleQueue[Submit | Stop] = queue.SimpleQueue()
        self._num_generated = 0
        self._is_stopping = False
        self._next_poll_s = 0.0
        self._next_poll_waiting_s = 0.0
        self._started_s = time.monotonic()
        self._warmed_up: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # Any thread -------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the engine thread; returns when it has run the model once, raises what that raised."""
        self._thread.start()
        self._warmed_up.result()

    def submit(self, request: GenerateRequest, sink: ResponseSink, arrived_s: float | None = None) -> None:
        """Check and queue a request that arrived at ``arrived_s``, by ``time.monotonic``, or just now.

        Raises InvalidRequest. Everything later arrives at ``sink``.
        """
        self._inbox.put(Submit(self.prepare(request, sink, arrived_s)))

    def prepare(self, request: GenerateRequest, sink: ResponseSink, arrived_s: float | None = None) -> RequestState:
        return self._intake.prepare(request, sink, time.monotonic() if arrived_s is None else arrived_s)

    def is_quick(self, request: GenerateRequest) -> bool:
        """Whether ``submit`` takes a few milliseconds at most."""
        return self._intake.is_quick(request)

    def stop(self) -> None:
        """End the engine thread; requests that are still inside get an error."""
        self._inbox.put(Stop())
        self._thread.join()

    # Engine thread ----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._runner.warm_up()
        except Exception as error:
            self._warmed_up.set_exception(error)
            return
        self._warmed_up.set_result(None)
        while not self._is_stopping:
            try:
                self._receive()
                self._drop_lost_requests()
                if self._scheduler.has_work and not self._is_stopping:
                    self.step()
            except Exception as error:  # a failed step must not take later requests with it
                log.exception("step_failed")
                if not self._recovers(EngineError(f"the engine failed while computing this request: {error}")):
                    self._refuse_all(EngineError(f"the engine cannot go on: {error}; it must be loaded again"))
                    return
        stopped = EngineStopped("the model is being unloaded; try again")
        if not self._recovers(stopped):
            self._refuse_all(stopped)

    def _recovers(self, error: EngineError) -> bool:
        """End every request; False if not even that can be done, as after an error of the device that stays."""
        try:
            self._fail_all(error)
            self._scheduler.forget_shared()
        except Exception:
            log.exception("engine_broken")
            return False
        return True

    def _refuse_all(self, error: EngineError) -> None:
        """Answer whoever is inside and whoever comes, until ``stop``; nothing of the device is touched any more."""
        for state in self._outputs:
            self._send_error(state, error)
        while True:
            try:
                message = self._inbox.get(block=not self._is_stopping)
            except queue.Empty:
                return
            if isinstance(message, Submit):
                self._send_error(message.state, error)
            else:
                self._is_stopping = True

    def step(self, on_plan: Callable[[StepPlan], None] | None = None) -> None:
        """Advance every scheduled sequence by one chunk or one token."""
        plan = self._scheduler.schedule()
        (on_plan or self._events.planned)(plan)
        self._arrange(plan)
        speculated = self._speculate(plan)
        ready = [*([] if speculated else self._decode(plan)), *self._prefill(plan)]
        self._sample([sequence for sequence in ready if not sequence.params.is_beam])
        self._advance_beams(sequence.state for sequence in ready if sequence.params.is_beam)
        self._update(plan, [*speculated, *ready])

    def _arrange(self, plan: StepPlan) -> None:
        """Copy rows out, about and in, so that everything is where the plan says."""
        for save in plan.saves:
            # A beam that holds no tokens of its own yet still has the source.
            if save.sequence.num_computed or save.sequence.state.source_ids:
                self._saved[save.sequence] = self._runner.save_row(save.row, save.sequence.num_computed)
            self._runner.free_row(save.row, save.num_kept)
        for copy in plan.copies:
            if isinstance(copy, RowMove):
                self._runner.copy_row(copy.source, copy.target, copy.sequence.num_computed)
                self._runner.free_row(copy.source)
            else:
                self._runner.copy_tokens(copy.source, copy.target, copy.start, copy.end)
        for start in plan.starts:
            if start.adapter.needs_load:
                self._load_adapter(start)
            for sequence in start.state.sequences:
                self._start(sequence, start.adapter.slot)
        plan.drop_removed()

    def _load_adapter(self, start: Start) -> None:
        """Fill the slot, or refuse every request that wants this adapter."""
        adapter = start.state.adapter
        assert adapter is not None
        try:
            self._runner.load_adapter(start.adapter.slot, self._adapters.read(adapter))
        except InvalidRequest as error:
            for state in tuple(self._scheduler.states()):
                if state.adapter == adapter:
                    self.abort(state, error)
            self._scheduler.forget_adapter(adapter)

    def _start(self, sequence: Sequence, adapter_slot: int) -> None:
        state = sequence.state
        state.scheduled_s = state.scheduled_s or time.monotonic()
        if sequence.row >= 0:
            self._runner.set_adapter(sequence.row, adapter_slot)
            if sequence in self._saved:
                self._runner.restore_row(sequence.row, self._saved.pop(sequence))

    def _speculate(self, plan: StepPlan) -> list[Sequence]:
        """Several tokens at once for a sequence that decodes alone, if they can be guessed; returns it if so."""
        if not self._config.engine.num_speculative_tokens or len(plan.decodes) != 1:
            return []
        (sequence,) = plan.decodes
        if not sequence.params.is_greedy or sequence.grammar is not None or self._sampler.needs_logits(sequence):
            return []
        for token_id in (chosen := self._speculator.propose(sequence)):
            sequence.num_computed = sequence.num_tokens
            self._append(sequence, SampledToken(token_id))
            if sequence.is_finished:
                break
        return [sequence] if chosen else []

    def _decode(self, plan: StepPlan) -> tuple[Sequence, ...]:
        """One token for every running sequence; returns those whose next token can be chosen now."""
        if plan.decodes:
            self._runner.decode(
                (DecodeToken(s.row, s.output_ids[-1], s.num_tokens - 1) for s in plan.decodes),
                want_logits=any(map(self._sampler.needs_logits, plan.decodes)),
            )
            for sequence in plan.decodes:
                sequence.num_computed = sequence.num_tokens
        return plan.decodes

    def _prefill(self, plan: StepPlan) -> list[Sequence]:
        """The plan's chunks of prompts; returns the sequences whose first token can be chosen now."""
        ready: list[Sequence] = []
        for chunk in plan.prefills:
            self._prefill_chunk(chunk)
            if chunk.is_last:
                self._scheduler.finish_prefill(chunk.state)
                ready += self._fork(chunk.state)
        return ready

    def _fork(self, state: RequestState) -> tuple[Sequence, ...]:
        """Give every sequence of a request what the leading one computed; beams take of a prompt what they need."""
        for sequence in state.sequences[1:]:
            if state.params.is_beam:
                self._runner.copy_source(state.lead.row, sequence.row)
            else:
                self._runner.copy_row(state.lead.row, sequence.row, state.num_prompt_tokens)
        return state.decoding

    def _prefill_chunk(self, chunk: PrefillChunk) -> None:
        lead, prefix = chunk.state.lead, chunk.prefix
        chunk.state.scheduled_s = chunk.state.scheduled_s or time.monotonic()  # a probe starts here
        if prefix is not None:
            self._runner.copy_tokens(prefix.source, prefix.target, prefix.start, prefix.end)
        if chunk.state.source_ids and chunk.start == 0:
            self._runner.encode(lead.row, chunk.state.source_ids)
        ids = lead.prompt_ids[chunk.start : chunk.start + chunk.length]
        if chunk.state.params.prompt_logprobs is None:
            self._runner.prefill(lead.row, ids, chunk.start, chunk.is_last and self._sampler.needs_logits(lead))
        else:
            outputs = self._runner.prefill_positions(lead.row, ids, chunk.start)
            next_ids = lead.prompt_ids[chunk.start + 1 : chunk.start + chunk.length + 1]
            chunk.state.prompt_logprobs += self._sampler.prompt_logprobs(lead.params, next_ids, outputs.logits)

    def _sample(self, sequences: list[Sequence]) -> None:
        for sequence, token in zip(sequences, self._sampler.sample(sequences, self._runner.outputs), strict=True):
            self._append(sequence, token)

    def _append(self, sequence: Sequence, token: SampledToken) -> None:
        """Add a token and its text, and see whether the sequence ends with it."""
        sequence.append(token)
        self._num_generated += 1
        is_end_token = token.token_id in sequence.state.end_token_ids
        is_last = (
            len(sequence.output_ids) >= sequence.params.max_tokens
            or sequence.num_tokens >= self._config.engine.max_model_len
        )
        # An end that was forced because there is no room left is no end of the text.
        has_ended = is_end_token and not (is_last and token.token_id == self._config.model.forced_eos_token_id)
        if has_ended or (sequence.grammar is not None and sequence.grammar.is_finished):
            sequence.finish_reason = FinishReason.STOP
        elif is_last:
            sequence.finish_reason = FinishReason.LENGTH
        self._outputs[sequence.state].append(sequence, is_end_token)

    def _advance_beams(self, states: Iterable[RequestState]) -> None:
        for state in dict.fromkeys(states):
            assert state.search is not None
            self._num_generated += len(state.beams)
            candidates = self._sampler.beam_candidates(state.beams, state.search.num_candidates, self._runner.outputs)
            for copy in beam_rows.advance(state, candidates, self._outputs[state].ends_beam, self._sampler.fork):
                self._runner.copy_tokens(copy.source, copy.target, copy.start, copy.end)

    def _update(self, plan: StepPlan, ready: list[Sequence]) -> None:
        """Free the rows of what ended, send what is due, and forget finished requests."""
        now_s = time.monotonic()
        for state in dict.fromkeys(sequence.state for sequence in ready):
            state.first_token_s = state.first_token_s or now_s
            state.last_token_s = now_s
            if (error := _grammar_error(state)) is not None:
                self.abort(state, InvalidRequest(error))
                continue
            self._free(s for s in state.sequences if s.is_finished or state.is_finished)
            response = self._outputs[state].next_response(self._request_metrics(state) if state.is_finished else {})
            if state.is_finished:
                self._forget(state)
                if not state.request.health_probe:
                    self._metrics.request_finished(state)
            if response is not None:
                state.sink.send(response)
        self._metrics.count_step(plan, self._num_generated)
        self._num_generated = 0
        self._update_load()

    def _free(self, sequences: Iterable[Sequence]) -> None:
        for sequence in sequences:
            if (row := sequence.row) >= 0:
                self._runner.free_row(row, self._scheduler.release(sequence))

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
            else:
                self._take(message.state)

    def _take(self, state: RequestState) -> None:
        try:
            self.accept(state)
        except Exception as error:
            if state in self._outputs:
                raise
            log.exception("request_not_taken")
            self._send_error(state, EngineError(f"the engine failed while it took this request: {error}"))

    def accept(self, state: RequestState) -> None:
        """Queue a request, or refuse it if too many are waiting."""
        if self._scheduler.is_full(state):
            self._send_error(state, QueueFull(
                f"{self._scheduler.num_waiting} requests are waiting already "
                f"(max_queue_size = {self._config.engine.max_queue_size}); try again later"
            ))  # fmt: skip
            return
        self._outputs[state] = RequestOutput(state, self._tokenizer, self._config.engine.stream_interval)
        self._scheduler.add(state)
        self._events.submitted(state)

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
            is_waiting = all(sequence.row < 0 for sequence in state.sequences)
            if now_s >= state.deadline_s:
                self.abort(state, RequestCancelled(f"timeout_ms = {state.request.params.timeout_ms} has passed"))
            elif (polls_waiting or not is_waiting) and state.sink.is_cancelled():
                self.abort(state, RequestCancelled("the client cancelled the request"))

    def abort(self, state: RequestState, error: EngineError) -> None:
        """End a request with an error, at whatever stage it is; nothing if it has ended."""
        if state not in self._outputs:
            return
        self._events.aborted(state, str(error))
        self._forget(state)
        self._metrics.request_aborted(state)
        self._send_error(state, error)
        self._update_load()

    def _fail_all(self, error: EngineError) -> None:
        for state in tuple(self._scheduler.states()):
            self.abort(state, error)
        # Who comes after the failed step has nothing to do with it.
        while self._is_stopping and not self._inbox.empty():
            message = self._inbox.get()
            if isinstance(message, Submit):
                self._send_error(message.state, error)

    def _forget(self, state: RequestState) -> None:
        self._free(state.sequences)
        for sequence in state.sequences:
            self._saved.pop(sequence, None)
        self._scheduler.remove(state)
        del self._outputs[state]

    def _send_error(self, state: RequestState, error: EngineError) -> None:
        state.sink.send(GenerateResponse(state.request.request_id, finished=True, error=str(error)))

    def _update_load(self) -> None:
        scheduler = self._scheduler
        self._metrics.update_load(scheduler.num_running, scheduler.num_waiting, scheduler.cache_usage)

    def _request_metrics(self, state: RequestState) -> dict[str, Any]:
        return {
            "num_sequences": state.params.num_sequences,
            "queue_s": round(state.scheduled_s - state.arrived_s, 6),
            "prefill_s": round(state.first_token_s - state.scheduled_s, 6),
            "decode_s": round(state.last_token_s - state.first_token_s, 6),
            "cached_tokens": state.num_cached_tokens,
            "preemptions": state.num_preemptions,
            "accepted_draft_tokens": state.num_accepted_tokens,
            "engine_uptime_s": round(time.monotonic() - self._started_s, 3),
            "digest": self._digest,
        }


def _grammar_error(state: RequestState) -> str | None:
    return next((s.grammar.error for s in state.sequences if s.grammar is not None and s.grammar.error), None)
