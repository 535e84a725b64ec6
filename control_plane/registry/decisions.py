"""What to do about the versions, decided from what should be and what is. Pure: no clock, no Triton, no files.

    desired (registry.desired) ─────┐
    index (Triton's states) ────────┼─► observe ─► decide ─► actions ─► outcomes ─► record ─┐
    records (what was done) ◄───────┴───────────────────────────────────────────────────────┘

A place is worked on by one action at a time; while one runs its record is ``busy``. Loading and unloading rewrite the
configuration of a Triton model, so only one of these runs per model. What failed is tried again with a growing pause,
until the files change or the version stays alive for a while.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum

from control_plane.registry.places import Place
from control_plane.registry.serving_state import FAILED_TO_LOAD, LOADED, LOADING, PENDING

MAX_PAUSE_S = 300.0
FIRST_PAUSE_S = 5.0
STABLE_S = 60.0
"""A version that has been alive for this long is forgiven its failures."""
MAX_LOST_LOADS = 3
"""Loads in a row during which Triton went away, until the version is to blame."""
UNREACHABLE_S = 60.0
"""Triton is restarted when it has not answered for this long."""


@dataclass(frozen=True)
class Desired:
    """One version that should be loaded. ``fingerprint`` is 0 as long as it is not installed.

    A load that takes longer than ``load_limit_s`` is stuck. ``digest`` is empty for one whose digest is of no interest.
    """

    digest: str
    fingerprint: int
    load_limit_s: float


class Verb(Enum):
    PROBE = "probe"
    LOAD = "load"
    RELOAD = "reload"
    UNLOAD = "unload"
    RESTART_TRITON = "restart_triton"

    @property
    def changes_model(self) -> bool:
        return self in (Verb.LOAD, Verb.RELOAD, Verb.UNLOAD)


@dataclass(frozen=True)
class Action:
    """``place`` is None for a restart because Triton itself does not answer.

    ``keep`` are the other versions of the same Triton model, which stay loaded; ``is_alone``: nothing else is served;
    ``is_tested``: whether its process has been seen to answer as it was proven.
    """

    verb: Verb
    place: Place | None
    digest: str = ""
    keep: tuple[int, ...] = ()
    load_limit_s: float = 0.0
    is_alone: bool = False
    is_tested: bool = False


class Verdict(Enum):
    """How an action ended."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    UNKNOWN = "unknown"
    """Triton was away; this says nothing about the version."""


@dataclass(frozen=True)
class Outcome:
    action: Action
    verdict: Verdict
    reason: str | None = None
    message: str | None = None
    is_tested: bool = False


@dataclass(frozen=True)
class Record:
    """Everything that is remembered about one place. Times are seconds of one monotonic clock."""

    digest: str = ""
    fingerprint: int = 0
    state: str = PENDING
    since: float = 0.0
    reason: str | None = None
    message: str | None = None
    num_failures: int = 0
    retry_at: float = 0.0
    probed_at: float = float("-inf")
    is_lost: bool = False
    """Triton calls it ready, but a probe said otherwise."""
    is_tested: bool = False
    """It was seen to answer as it was proven, and to be trusted, since it was last loaded."""
    loading_since: float | None = None
    """Triton loads it without having been told to by us: another load was begun, or files changed in its model."""
    busy: Verb | None = None
    busy_since: float = 0.0


Records = Mapping[Place, Record]
Index = Mapping[Place, str]


def loaded_places(index: Index | None, records: Records) -> set[Place]:
    """What Triton has ready and what was looked at, if it is known at all."""
    ready = {place for place, state in (index or {}).items() if state == "READY"}
    return {place for place in ready if place not in records or _is_loaded(records[place])}


def observe(desired: Mapping[Place, Desired], index: Index | None, records: Records, now: float) -> dict[Place, Record]:
    """Take in what changed without us: new wishes, changed files, a server that went away, a load somebody began."""
    observed = {}
    for place, wanted in desired.items():
        record = records.get(place) or Record(wanted.digest, wanted.fingerprint, since=now)
        if record.busy is None:
            record = _compare(record, wanted, now)
        triton_state = None if index is None else index.get(place)
        if index is None and record.state == LOADED:
            record = _enter(record, PENDING, now, "RuntimeUnhealthy", "Triton does not answer")
        elif triton_state == "LOADING" and record.busy is None and record.state != LOADED:
            # One that was loaded answers on while Triton loads it anew.
            record = _enter(record, LOADING, now)
        is_loading = triton_state == "LOADING" and record.busy is None
        loading_since = (record.loading_since or now) if is_loading else None
        is_lost = record.is_lost and triton_state == "READY"
        observed[place] = replace(record, loading_since=loading_since, is_lost=is_lost)
    # What is not wanted is remembered for as long as it is loaded.
    ready = [place for place, state in (index or {}).items() if state == "READY"]
    for place in {*ready, *(place for place, record in records.items() if record.busy)} - desired.keys():
        observed[place] = records.get(place, Record(since=now))
    return observed


def decide(
    desired: Mapping[Place, Desired],
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
    changing = {place.model for place, record in records.items() if record.busy and record.busy.changes_model}
    actions = []
    for place in [*(records.keys() - desired.keys()), *desired]:
        record = records[place]
        if place in desired:
            verb = _decide_place(desired[place], index.get(place), record, now, probe_interval_s)
        else:
            verb = None if record.busy or now < record.retry_at else Verb.UNLOAD
        if verb is None or (verb.changes_model and place.model in changing):
            continue
        if verb.changes_model:
            changing.add(place.model)
        keep = _others(place, index, records)
        if place not in desired:
            actions.append(Action(verb, place, keep=keep))
            continue
        wanted = desired[place]
        is_alone = len(records) == 1
        actions.append(
            Action(verb, place, wanted.digest, keep, wanted.load_limit_s, is_alone, is_tested=record.is_tested)
        )
    return actions


def _is_loaded(record: Record) -> bool:
    return record.state == LOADED and not record.is_lost


def _compare(record: Record, wanted: Desired, now: float) -> Record:
    if record.digest != wanted.digest and wanted.digest:
        return Record(wanted.digest, wanted.fingerprint, since=now)
    if record.fingerprint != wanted.fingerprint:
        # Changed files are worth a try at once; a loaded version is left alone.
        is_changed = record.fingerprint != 0
        record = replace(record, fingerprint=wanted.fingerprint)
        return replace(record, num_failures=0, retry_at=now) if is_changed else record
    return record


def _decide_place(
    wanted: Desired, triton_state: str | None, record: Record, now: float, probe_interval_s: float
) -> Verb | None:
    loading_since = record.busy_since if record.busy in (Verb.LOAD, Verb.RELOAD) else record.loading_since
    if loading_since is not None:
        return Verb.RESTART_TRITON if now - loading_since > wanted.load_limit_s else None
    if record.busy is not None:
        return None
    if triton_state == "READY" and not record.is_lost:
        is_due = record.state != LOADED or now - record.probed_at >= probe_interval_s
        return Verb.PROBE if is_due else None
    if now < record.retry_at:
        return None
    return Verb.RELOAD if triton_state == "READY" else Verb.LOAD


def _others(place: Place, index: Index, records: Records) -> tuple[int, ...]:
    """Other versions of the same Triton model that answer; one whose folder was deleted is not in the index."""
    ready = {other for other, state in index.items() if state == "READY"}
    ready |= {other for other, record in records.items() if _is_loaded(record)}
    return tuple(sorted(other.version for other in ready if other.model == place.model and other != place))


def begin(records: Records, action: Action, now: float) -> dict[Place, Record]:
    """Note that ``action`` has begun."""
    if action.place is None or action.verb is Verb.RESTART_TRITON:
        return dict(records)
    record = replace(records[action.place], busy=action.verb, busy_since=now)
    if action.verb in (Verb.LOAD, Verb.RELOAD):
        # The reason for which it is loaded again stays readable.
        record = replace(record, state=LOADING, since=now, is_tested=False)
    elif action.verb is Verb.UNLOAD:
        # Wanted again meanwhile, it is not to be counted on: it goes, and is then loaded anew.
        record = _enter(record, PENDING, now)
    return {**records, action.place: record}


def record(records: Records, outcome: Outcome, now: float) -> dict[Place, Record]:
    """Note how an action ended."""
    place, verb = outcome.action.place, outcome.action.verb
    if place is None or place not in records:
        return dict(records)
    if verb is Verb.UNLOAD and outcome.verdict is Verdict.SUCCEEDED:
        return {other: record for other, record in records.items() if other != place}
    ended = replace(records[place], busy=None, probed_at=now)
    ended = replace(ended, is_tested=ended.is_tested or outcome.is_tested)
    if outcome.verdict is Verdict.UNKNOWN and verb is Verb.LOAD:
        ended = _lost_while_loading(ended, outcome, now)
    elif outcome.verdict is Verdict.UNKNOWN:
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
    return {**records, place: ended}


def pause_s(num_failures: int) -> float:
    """How long to wait after the n-th failure in a row: 5, 10, 20, … at most 300 seconds."""
    return min(MAX_PAUSE_S, FIRST_PAUSE_S * 2.0 ** (min(num_failures, 20) - 1))


def _failed(record: Record, outcome: Outcome, now: float) -> Record:
    num_failures = record.num_failures + 1
    if outcome.action.verb is Verb.PROBE:
        # The first loss is mended at once; a version that keeps dying is not reloaded all the time.
        pause = 0.0 if num_failures == 1 else pause_s(num_failures - 1)
        record, state = replace(record, is_lost=True), PENDING
    else:
        pause, state = pause_s(num_failures), FAILED_TO_LOAD
    record = _enter(record, state, now, outcome.reason, outcome.message)
    return replace(record, num_failures=num_failures, retry_at=now + pause)


def _lost_while_loading(record: Record, outcome: Outcome, now: float) -> Record:
    """Triton went away: by chance, or because this version takes it with it."""
    num_failures = record.num_failures + 1
    if num_failures >= MAX_LOST_LOADS:
        message = f"Triton went away {num_failures} times while it was loaded: {outcome.message}"
        return _failed(record, replace(outcome, reason="ModelLoadFailed", message=message), now)
    record = _enter(record, PENDING, now, "RuntimeUnhealthy", outcome.message)
    return replace(record, num_failures=num_failures, retry_at=now + 1.0)


def _enter(record: Record, state: str, now: float, reason: str | None = None, message: str | None = None) -> Record:
    since = record.since if record.state == state else now
    return replace(record, state=state, since=since, reason=reason, message=message)
