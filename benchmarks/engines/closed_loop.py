"""n clients, each of which sends its next request as soon as its last one is answered; what an engine serves.

An engine asks for ``arrivals``, reports every token as it becomes known, and stops when ``is_done``. The loop knows
requests and times, not engines, so that every engine is asked the same in the same way:

    while not loop.is_done:
        for request in loop.arrivals(): …start it…
        …one step…; loop.token(index, token) for each row
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Arrival:
    """One request: ``index`` is its place in the workload."""

    index: int
    prompt: Sequence[int]


@dataclass
class Answer:
    """One request's tokens and when each was known, in seconds of one clock; ``sent_s`` is when its client sent it."""

    sent_s: float
    tokens: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)


class ClosedLoop:
    """Owner of the clients of one run. Every answer has ``num_new`` tokens."""

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        num_clients: int,
        num_new: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.num_clients = num_clients
        self.num_new = num_new
        self._clock = clock
        self._waiting = deque(Arrival(index, prompt) for index, prompt in enumerate(prompts))
        self._answers: dict[int, Answer] = {}
        self._num_open = 0

    @property
    def is_done(self) -> bool:
        return not self._waiting and not self._num_open

    @property
    def answers(self) -> list[Answer]:
        """In the order of the workload."""
        return [self._answers[index] for index in sorted(self._answers)]

    def arrivals(self) -> Iterator[Arrival]:
        """The requests that are sent now: one for every client that has none open."""
        while self._waiting and self._num_open < self.num_clients:
            arrival = self._waiting.popleft()
            self._num_open += 1
            self._answers[arrival.index] = Answer(self._clock())
            yield arrival

    def token(self, index: int, token: int, time_s: float | None = None) -> bool:
        """Note the next token of a request, known now or at ``time_s``; returns whether that was its last."""
        answer = self._answers[index]
        answer.tokens.append(int(token))
        answer.times_s.append(self._clock() if time_s is None else time_s)
        is_last = len(answer.tokens) == self.num_new
        self._num_open -= is_last
        return is_last


Serve = Callable[[ClosedLoop], None]
