"""Which metrics the engine publishes, and the calls by which it does so.

Names, kinds and buckets are vLLM's, so that existing dashboards and autoscalers read them; the ``nv_trt_llm`` family
feeds Triton's load header. Where they go is a ``MetricSink`` chosen by the process: Triton's Prometheus endpoint or
nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from triton_backend.scheduler import StepPlan
from triton_backend.sequence import RequestState

_LATENCY_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 30.0, 60.0)
_SEQUENCES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
_TOKENS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10000.0)


@dataclass(frozen=True, eq=False)
class MetricSpec:
    """One metric family. ``kind`` is counter, gauge or histogram; ``labels`` are added to model and version."""

    name: str
    kind: str
    description: str
    buckets: tuple[float, ...] = ()
    labels: dict[str, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Identity of the series: the family and its fixed labels."""
        return ":".join([self.name, *self.labels.values()])


RUNNING = MetricSpec("vllm:num_requests_running", "gauge", "Requests that hold cache rows.")
WAITING = MetricSpec("vllm:num_requests_waiting", "gauge", "Requests waiting for cache rows.")
CACHE_USAGE = MetricSpec("vllm:kv_cache_usage_perc", "gauge", "Used cache rows; 1 means all of them.")
PROMPT_TOKENS = MetricSpec("vllm:prompt_tokens_total", "counter", "Prompt tokens of started requests.")
GENERATION_TOKENS = MetricSpec("vllm:generation_tokens_total", "counter", "Generated tokens.")
TIME_TO_FIRST_TOKEN = MetricSpec("vllm:time_to_first_token_seconds", "histogram", "Arrival to first token.", _LATENCY_S)
INTER_TOKEN_LATENCY = MetricSpec(
    "vllm:inter_token_latency_seconds", "histogram", "Mean time between tokens of a request.", _LATENCY_S
)
E2E_LATENCY = MetricSpec("vllm:e2e_request_latency_seconds", "histogram", "Arrival to last token.", _LATENCY_S)
QUEUE_TIME = MetricSpec("vllm:request_queue_time_seconds", "histogram", "Arrival to first computation.", _LATENCY_S)
REQUEST_PROMPT_TOKENS = MetricSpec("vllm:request_prompt_tokens", "histogram", "Prompt length.", _TOKENS)
REQUEST_GENERATION_TOKENS = MetricSpec("vllm:request_generation_tokens", "histogram", "Output length.", _TOKENS)
PREFILL_TIME = MetricSpec(
    "vllm:request_prefill_time_seconds", "histogram", "First computation to first token.", _LATENCY_S
)
DECODE_TIME = MetricSpec("vllm:request_decode_time_seconds", "histogram", "First to last token.", _LATENCY_S)
REQUEST_N = MetricSpec("vllm:request_params_n", "histogram", "Sequences asked for by a request.", _SEQUENCES)
PREFIX_QUERIES = MetricSpec(
    "vllm:prefix_cache_queries_total", "counter", "Prompt tokens that were looked for in the prefix cache."
)
PREFIX_HITS = MetricSpec("vllm:prefix_cache_hits_total", "counter", "Prompt tokens found in the prefix cache.")
PREEMPTIONS = MetricSpec("vllm:num_preemptions_total", "counter", "Requests copied out to make room for urgent ones.")
DRAFT_TOKENS = MetricSpec("vllm:spec_decode_num_draft_tokens_total", "counter", "Tokens drafted.")
ACCEPTED_TOKENS = MetricSpec("vllm:spec_decode_num_accepted_tokens_total", "counter", "Drafted tokens that were right.")
FINISHED = {
    reason: MetricSpec(
        "vllm:request_success_total", "counter", "Finished sequences.", labels={"finished_reason": reason}
    )
    for reason in ("stop", "length", "abort")
}
_ROWS = "nv_trt_llm_kv_cache_block_metrics"
ROWS_USED = MetricSpec(_ROWS, "gauge", "Cache rows.", labels={"kv_cache_block_type": "used"})
ROWS_MAX = MetricSpec(_ROWS, "gauge", "Cache rows.", labels={"kv_cache_block_type": "max"})
TOKENS_PER_ROW = MetricSpec(_ROWS, "gauge", "Cache rows.", labels={"kv_cache_block_type": "tokens_per"})

METRICS: tuple[MetricSpec, ...] = (
    RUNNING, WAITING, CACHE_USAGE, PROMPT_TOKENS, GENERATION_TOKENS, TIME_TO_FIRST_TOKEN, INTER_TOKEN_LATENCY,
    E2E_LATENCY, QUEUE_TIME, PREFILL_TIME, DECODE_TIME, REQUEST_PROMPT_TOKENS, REQUEST_GENERATION_TOKENS, REQUEST_N,
    PREFIX_QUERIES, PREFIX_HITS, PREEMPTIONS, DRAFT_TOKENS, ACCEPTED_TOKENS, *FINISHED.values(),
    ROWS_USED, ROWS_MAX, TOKENS_PER_ROW,
)  # fmt: skip


class MetricSink(Protocol):
    """Where values go. Counters add, gauges replace, histograms observe."""

    def record(self, spec: MetricSpec, value: float) -> None: ...


class NoMetrics:
    """A sink for processes without a metrics endpoint."""

    def record(self, spec: MetricSpec, value: float) -> None:
        pass


class EngineMetrics:
    """Translates what happens in the engine into metrics; one call into the sink costs about 12 µs, so gauges are sent
    only when they change and counters once per step."""

    def __init__(self, sink: MetricSink, num_rows: int, tokens_per_row: int) -> None:
        self._sink = sink
        self._num_rows = num_rows
        self._gauges: dict[str, float] = {}
        self._set(ROWS_MAX, num_rows)
        self._set(TOKENS_PER_ROW, tokens_per_row)
        self.update_load(0, 0, 0.0)

    def update_load(self, num_running: int, num_waiting: int, cache_usage: float) -> None:
        self._set(RUNNING, num_running)
        self._set(WAITING, num_waiting)
        self._set(CACHE_USAGE, cache_usage)
        self._set(ROWS_USED, round(cache_usage * self._num_rows))

    def count_step(self, plan: StepPlan, num_generated: int) -> None:
        prefilled = [c.state for c in plan.prefills if c.is_last and not c.state.request.health_probe]
        counts = {
            PROMPT_TOKENS: sum(state.num_input_tokens for state in prefilled),
            GENERATION_TOKENS: num_generated,
            PREFIX_QUERIES: sum(state.num_prompt_tokens for state in prefilled if not state.source_ids),
            PREFIX_HITS: sum(state.num_cached_tokens for state in prefilled),
            PREEMPTIONS: len({save.sequence.state for save in plan.saves}),
        }
        for spec, count in counts.items():
            if count:
                self._sink.record(spec, count)

    def request_finished(self, state: RequestState) -> None:
        record = self._sink.record
        decode_s = state.last_token_s - state.first_token_s
        record(TIME_TO_FIRST_TOKEN, state.first_token_s - state.arrived_s)
        record(E2E_LATENCY, state.last_token_s - state.arrived_s)
        record(QUEUE_TIME, state.scheduled_s - state.arrived_s)
        record(PREFILL_TIME, state.first_token_s - state.scheduled_s)
        record(DECODE_TIME, decode_s)
        record(REQUEST_PROMPT_TOKENS, state.num_input_tokens)
        record(REQUEST_GENERATION_TOKENS, state.num_output_tokens)
        record(REQUEST_N, state.params.n)
        if state.num_draft_tokens:
            record(DRAFT_TOKENS, state.num_draft_tokens)
            record(ACCEPTED_TOKENS, state.num_accepted_tokens)
        longest = max((len(sequence.output_ids) for sequence in state.returned), default=0)
        if longest > 1:
            record(INTER_TOKEN_LATENCY, decode_s / (longest - 1))
        for sequence in state.returned:
            assert sequence.finish_reason is not None
            record(FINISHED[sequence.finish_reason.value], 1)

    def request_aborted(self, state: RequestState) -> None:
        self._sink.record(FINISHED["abort"], len(state.sequences))

    def _set(self, spec: MetricSpec, value: float) -> None:
        if self._gauges.get(spec.key) != value:
            self._gauges[spec.key] = value
            self._sink.record(spec, value)
