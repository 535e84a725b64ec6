"""The counts of this web process, and when workers last answered, as Prometheus reads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import accumulate

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from control_plane.jobs.worker_watch import QueueState
from control_plane.traffic.counts import BOUNDS_S, END, FIRST_TOKEN, Counts, buckets, outcomes

LABELS = ("model", "version")
HISTOGRAMS = {
    FIRST_TOKEN: ("llmos_time_to_first_token_seconds", "Arrival to first token."),
    END: ("llmos_request_seconds", "Arrival to the end of the answer."),
}
COUNTERS = {
    "prompt_tokens": ("llmos_prompt_tokens", "Prompt tokens of requests that have ended."),
    "completion_tokens": ("llmos_completion_tokens", "Generated tokens of requests that have ended."),
}
WORKER_ANSWER = "llmos_worker_last_answer_timestamp_seconds"
METRICS = (
    WORKER_ANSWER,
    "llmos_requests_total",
    *(f"{name}_total" for name, _ in COUNTERS.values()),
    *(name for name, _ in HISTOGRAMS.values()),
)
"""Names as Prometheus stores them."""


class _Totals(Collector):
    def __init__(self, totals: Mapping[tuple[str, int], Counts]) -> None:
        self._totals = {(model, str(version)): counts for (model, version), counts in totals.items()}

    def collect(self) -> Iterator[Metric]:
        requests = CounterMetricFamily("llmos_requests", "Requests that have ended.", labels=(*LABELS, "outcome"))
        for version, counts in self._totals.items():
            for outcome, number in outcomes(counts).items():
                requests.add_metric((*version, outcome), number)
        yield requests
        for field, (name, text) in COUNTERS.items():
            counter = CounterMetricFamily(name, text, labels=LABELS)
            for version, counts in self._totals.items():
                counter.add_metric(version, counts.get(field, 0))
            yield counter
        for field, (name, text) in HISTOGRAMS.items():
            histogram = HistogramMetricFamily(name, text, labels=LABELS)
            for version, counts in self._totals.items():
                bounds = [*map(str, BOUNDS_S), "+Inf"]
                cumulated = list(zip(bounds, accumulate(buckets(counts, field)), strict=True))
                histogram.add_metric(version, cumulated, counts.get(f"{field}.us", 0) / 1e6)
            yield histogram


class _Workers(Collector):
    def __init__(self, queues: Mapping[str, QueueState]) -> None:
        self._queues = queues

    def collect(self) -> Iterator[Metric]:
        text = "When a worker last showed that it consumes a queue of jobs."
        answered = GaugeMetricFamily(WORKER_ANSWER, text, labels=("queue",))
        for name, queue in self._queues.items():
            if queue.answered_at is not None:
                answered.add_metric((name,), queue.answered_at)
        yield answered


def render(totals: Mapping[tuple[str, int], Counts], queues: Mapping[str, QueueState]) -> str:
    registry = CollectorRegistry()
    registry.register(_Totals(totals))
    registry.register(_Workers(queues))
    return generate_latest(registry).decode()
