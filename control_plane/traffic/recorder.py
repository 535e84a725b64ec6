"""Counts of the web process, and their way to Redis, where they survive its restart.

    record (any thread, microseconds) ─► pending, by minute ─► flush, once a second ─► llmos:traffic:minute:…  26 hours
                                    └──► totals of this process (/metrics)             llmos:traffic:hour:…    31 days

While Redis is away what is pending waits, and requests notice nothing. A transaction whose answer is lost with the
connection is sent again and may count twice: once in an outage.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from functools import cached_property
from typing import Any, NamedTuple

import redis
import structlog
from redis.backoff import NoBackoff
from redis.retry import Retry

from control_plane.traffic.counts import Observation, add

MINUTE_S, HOUR_S = 60, 3600
KEPT_S = {MINUTE_S: 26 * HOUR_S, HOUR_S: 31 * 24 * HOUR_S}
"""How long the hashes of a minute and of an hour are kept."""
FLUSH_S = 1.0
TIMEOUT_S = 1.0
MAX_PENDING = 1000
"""Versions times minutes that wait for a Redis that is away; the oldest go first."""

log = structlog.get_logger(__name__)


class Slot(NamedTuple):
    """One version in one stretch of ``length_s`` seconds: the one that is ``number`` since the epoch."""

    model: str
    version: int
    length_s: int
    number: int

    @property
    def key(self) -> str:
        period = {MINUTE_S: "minute", HOUR_S: "hour"}[self.length_s]
        return f"llmos:traffic:{period}:{self.number}:{self.model}:{self.version}"

    @property
    def hour(self) -> Slot:
        return self._replace(length_s=HOUR_S, number=self.number * self.length_s // HOUR_S)


class TrafficRecorder:
    """One per web process, shared by its threads; the lock is held for microseconds, never while Redis is asked."""

    def __init__(self, redis_url: str) -> None:
        self._redis_url = redis_url
        self._lock = threading.Lock()
        self._flushing = threading.Lock()
        self._pending: dict[Slot, dict[str, int]] = {}
        self._totals: dict[tuple[str, int], dict[str, int]] = {}
        self._is_scheduled = False
        self._is_away = False

    def record(self, seen: Observation) -> None:
        slot = Slot(seen.model, seen.version, MINUTE_S, int(time.time()) // MINUTE_S)
        counts = seen.counts
        with self._lock:
            add(self._pending.setdefault(slot, {}), counts)
            add(self._totals.setdefault((seen.model, seen.version), {}), counts)
            is_first, self._is_scheduled = not self._is_scheduled, True
        if is_first:
            self._schedule()

    def flush(self) -> bool:
        """Write what is pending; False, and all of it kept, if Redis does not answer."""
        with self._flushing:
            with self._lock:
                taken, self._pending = self._pending, {}
                self._is_scheduled = False
            try:
                if taken:
                    self._write(taken)
            except (redis.RedisError, ValueError, OSError) as error:
                self._keep(taken)
                return self._note(str(error))
            return not taken or self._note(None)

    def pending(self) -> dict[Slot, dict[str, int]]:
        """What Redis does not have yet."""
        with self._lock:
            return {slot: dict(counts) for slot, counts in self._pending.items()}

    def totals(self) -> dict[tuple[str, int], dict[str, int]]:
        """Counts by model and version since this process started."""
        with self._lock:
            return {version: dict(counts) for version, counts in sorted(self._totals.items())}

    def read(self, slots: Iterable[Slot]) -> dict[Slot, dict[str, int]] | None:
        """What Redis has; None if it does not answer."""
        asked = list(slots)
        try:
            with self._redis.pipeline(transaction=False) as pipeline:
                for slot in asked:
                    pipeline.hgetall(slot.key)
                answers = pipeline.execute()
        except (redis.RedisError, ValueError, OSError) as error:
            self._note(str(error))
            return None
        return {
            slot: {field.decode(): int(value) for field, value in answer.items()}
            for slot, answer in zip(asked, answers, strict=True)
        }

    @cached_property
    def _redis(self) -> Any:
        # Once more at once: the pooled connection may be one to a Redis that was restarted.
        retry = Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,))
        return redis.Redis.from_url(
            self._redis_url, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S, retry=retry
        )

    def _schedule(self) -> None:
        """By the first request after a flush: an idle process has no thread that wakes up."""
        timer = threading.Timer(FLUSH_S, self.flush)
        timer.daemon = True
        try:
            timer.start()
        except RuntimeError as error:
            # No thread to be had, or the process ends: counting must not fail a request.
            self._is_scheduled = False
            log.warning("traffic_not_flushed", reason=str(error))

    def _write(self, taken: dict[Slot, dict[str, int]]) -> None:
        with self._redis.pipeline(transaction=True) as pipeline:
            for minute, counts in taken.items():
                for slot in (minute, minute.hour):
                    for field, value in counts.items():
                        pipeline.hincrby(slot.key, field, value)
                    pipeline.expire(slot.key, KEPT_S[slot.length_s])
            pipeline.execute()

    def _keep(self, taken: dict[Slot, dict[str, int]]) -> None:
        with self._lock:
            for slot, counts in taken.items():
                add(self._pending.setdefault(slot, {}), counts)
            for slot in sorted(self._pending, key=lambda slot: slot.number)[:-MAX_PENDING]:
                del self._pending[slot]

    def _note(self, problem: str | None) -> bool:
        """Say once that Redis is away, once that it is back; whether it is there."""
        if problem is not None and not self._is_away:
            log.warning("traffic_waits_for_redis", reason=problem)
        elif problem is None and self._is_away:
            log.info("traffic_is_stored_again")
        self._is_away = problem is not None
        return problem is None
