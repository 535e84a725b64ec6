"""What to do about the models, decided from what should be and what is. Pure: no clock, no Triton, no files.

    desired (installed models) ─┐
    index (Triton's states) ────┼─► observe ─► decide ─► actions ─► outcomes ─► record ─┐
    records (what was done) ◄───┴───────────────────────────────────────────────────────┘

A model is worked on by one action at a time; while one runs its record is ``busy``. What failed is tried again with a
growing pause, until the files change or the model stays alive for a while.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum

from control_plane.registry.serving_state import FAILED_TO_LOAD, LOADED, LOADING, PENDING

MAX_PAUSE_S = 300.0
FIRST_PAUSE_S = 5.0
STABLE_S = 60.0
"""A model that has been alive for this long is forgiven its failures."""
UNREACHABLE_S = 60.0
"""Triton is restarted when it has not answered for this long."""


@dataclass(frozen=True)
class Desired:
    """One model that should be served. A load that takes longer than ``load_limit_s`` is stuck."""

    version: int
    fingerprint: int
    load_limit_s: float


class Verb(Enum):
    PROBE = "probe"
    LOAD = "load"
    RELOAD = "reload"
    UNLOAD = "unload"
    RESTART_TRITON = "restart_triton"


@dataclass(frozen=True)
class Action:
    """``model`` is None for a restart because Triton itself does not answer; ``is_alone``: no other model is served."""

    verb: Verb
    model: str | None
    version: int = 0
    load_limit_s: float = 0.0
    is_alone: bool = False


class Verdict(Enum):
    """How an action ended."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    UNKNOWN = "unknown"
    """Triton was away; this says nothing about the model."""


@dataclass(frozen=True)
class Outcome:
    action: Action
    verdict: Verdict
    reason: str | None = None
    message: str | None = None


@dataclass(frozen=True)
class Record:
    """Everything that is remembered about one model. Times are seconds of one monotonic clock."""

    version: int
    fingerprint: int
    state: str = PENDING
    since: float = 0.0
    reason: str | None = None
    message: str | None = None
    num_failures: int = 0
    retry_at: float = 0.0
    probed_at: float = float("-inf")
    is_lost: bool = False
    """Triton calls it ready, but a probe said otherwise."""
    busy: Verb | None = None
    busy_since: float = 0.0


Records = Mapping[str, Record]
Index = Mapping[tuple[str, int], str]


def observe(desired: Mapping[str, Desired], index: Index | None, records: Records, now: float) -> dict[str, Record]:
    """Take in what changed without us: new and changed files, a server that went away, a load that somebody began."""
    observed = {name: record for name, record in records.items() if name not in desired}
    for name, wanted in desired.items():
        record = records.get(name) or Record(wanted.version, wanted.fingerprint, since=now)
        if (record.version, record.fingerprint) != (wanted.version, wanted.fingerprint) and record.busy is None:
            # Changed files are worth a try at once; a loaded model is left alone unless its version changed.
            record = replace(record, fingerprint=wanted.fingerprint, num_failures=0, retry_at=now)
            if record.version != wanted.version:
                record = Record(wanted.version, wanted.fingerprint, since=now)
        triton_state = None if index is None else index.get((name, wanted.version))
        if index is None and record.state == LOADED:
            record = _enter(record, PENDING, now, "RuntimeUnhealthy", "Triton does not answer")
        elif triton_state == "LOADING" and record.busy is None and record.state != LOADING:
            record = _enter(record, LOADING, now)
        observed[name] = replace(record, is_lost=record.is_lost and triton_state == "READY")
    return observed


def decide(
    desired: Mapping[str, Desired],
    index: Index | None,
    records: Records,
    now: float,
    probe_interval_s: float,
    unreachable_since: float | None = None,
) -> list[Action]:
    """The actions to begin now. ``index`` is None while Triton does not answer."""
    if index is None:
        is_hung = unreachable_since is not None and now - unreachable_since > UNREACHABLE_S
        return [Action(Verb.RESTART_TRITON, None)] if is_hung else []
    actions = []
    for name, wanted in desired.items():
        triton_state, is_alone = index.get((name, wanted.version)), len(records) == 1
        action = _decide_model(name, wanted, triton_state, records[name], now, probe_interval_s, is_alone)
        if action is not None:
            actions.append(action)
    gone = [name for name, record in records.items() if name not in desired and record.busy is None]
    return actions + [Action(Verb.UNLOAD, name, records[name].version) for name in gone]


def _decide_model(
    name: str,
    wanted: Desired,
    triton_state: str | None,
    record: Record,
    now: float,
    probe_interval_s: float,
    is_alone: bool,
) -> Action | None:
    is_loading = record.busy in (Verb.LOAD, Verb.RELOAD) or (record.busy is None and triton_state == "LOADING")
    if is_loading:
        loading_since = record.busy_since if record.busy else record.since
        is_stuck = now - loading_since > wanted.load_limit_s
        return Action(Verb.RESTART_TRITON, name, wanted.version) if is_stuck else None
    if record.busy is not None:
        return None
    if triton_state == "READY" and not record.is_lost:
        is_due = record.state != LOADED or now - record.probed_at >= probe_interval_s
        return Action(Verb.PROBE, name, wanted.version) if is_due else None
    if now < record.retry_at:
        return None
    verb = Verb.RELOAD if triton_state == "READY" else Verb.LOAD
    return Action(verb, name, wanted.version, wanted.load_limit_s, is_alone)


def begin(records: Records, action: Action, now: float) -> dict[str, Record]:
    """Note that ``action`` has begun."""
    if action.model is None or action.verb is Verb.RESTART_TRITON:
        return dict(records)
    record = replace(records[action.model], busy=action.verb, busy_since=now)
    if action.verb in (Verb.LOAD, Verb.RELOAD):
        # The reason for which it is loaded again stays readable.
        record = replace(record, state=LOADING, since=now)
    return {**records, action.model: record}


def record(records: Records, outcome: Outcome, now: float) -> dict[str, Record]:
    """Note how an action ended."""
    name, verb = outcome.action.model, outcome.action.verb
    if name is None or name not in records:
        return dict(records)
    if verb is Verb.UNLOAD and outcome.verdict is Verdict.SUCCEEDED:
        return {other: record for other, record in records.items() if other != name}
    ended = replace(records[name], busy=None, probed_at=now)
    if outcome.verdict is Verdict.UNKNOWN:
        if ended.state == LOADING:
            ended = _enter(ended, PENDING, now, "RuntimeUnhealthy", outcome.message)
        ended = replace(ended, retry_at=now + 1.0)
    elif outcome.verdict is Verdict.FAILED:
        ended = _failed(ended, outcome, now)
    elif verb in (Verb.LOAD, Verb.RELOAD, Verb.PROBE):
        if ended.state != LOADED:
            ended = _enter(replace(ended, is_lost=False), LOADED, now)
        elif now - ended.since > STABLE_S:
            ended = replace(ended, num_failures=0)
    return {**records, name: ended}


def pause_s(num_failures: int) -> float:
    """How long to wait after the n-th failure in a row: 5, 10, 20, … at most 300 seconds."""
    return min(MAX_PAUSE_S, FIRST_PAUSE_S * 2.0 ** (min(num_failures, 20) - 1))


def _failed(record: Record, outcome: Outcome, now: float) -> Record:
    num_failures = record.num_failures + 1
    if outcome.action.verb is Verb.PROBE:
        # The first loss is mended at once; a model that keeps dying is not reloaded all the time.
        pause = 0.0 if num_failures == 1 else pause_s(num_failures - 1)
        record, state = replace(record, is_lost=True), PENDING
    else:
        pause, state = pause_s(num_failures), FAILED_TO_LOAD
    record = _enter(record, state, now, outcome.reason, outcome.message)
    return replace(record, num_failures=num_failures, retry_at=now + pause)


def _enter(record: Record, state: str, now: float, reason: str | None = None, message: str | None = None) -> Record:
    since = record.since if record.state == state else now
    return replace(record, state=state, since=since, reason=reason, message=message)
