"""Makes Triton serve what the registry wants, without a person; ``control_plane.reconciler`` is its process.

Twice a second it reads what is wanted (SQL) and what is (Triton's index), begins what ``decisions.decide`` says, each
action in a thread of its own so that a slow load delays nothing else, ends the deployments that are done, and writes
serving.json. While SQL does not answer, what was wanted last is wanted still.

A version counts as loaded when it has answered a probe with the right digest and repeated tokens of its certificate.
The one-token probe is answered from a cache row that the engine keeps for it, between two steps, so a busy engine
answers and is never reloaded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import structlog
from flask import Flask
from sqlalchemy.exc import SQLAlchemyError

from control_plane import errors
from control_plane.artifacts import ArtifactStore, artifact_store
from control_plane.registry import decisions, deployments, model_directory, model_processes, serving_state
from control_plane.registry.decisions import Action, Desired, Outcome, Record, Verb, Verdict
from control_plane.registry.desired import ModelIntent, desired_places
from control_plane.registry.places import Place
from control_plane.registry.serving_state import ModelState, ServingState
from control_plane.registry.smoke import smoke_test
from control_plane.settings import Settings
from control_plane.signatures import TrustedKeys
from control_plane.triton import TritonClient

TICK_S = 0.5
LOAD_LIMIT_S = 120.0
LOAD_BYTES_PER_S = 50e6
"""A version is read twice while it is loaded (digest, weights); this is a slow disk."""
CLOCK_JUMP_S = 1.0
MAX_ACTIONS = 32
LEAVE_S = 0.5
"""From when a version is said to be gone until it is unloaded: routers look at serving.json five times a second."""

log = structlog.get_logger()


class Reconciler:
    """Owned by the main thread; actions run in the pool and touch nothing of this object but its clients."""

    def __init__(self, app: Flask) -> None:
        self._app = app
        self._settings: Settings = app.config["SETTINGS"]
        self._triton: TritonClient = app.extensions["triton"]
        self._store: ArtifactStore = artifact_store(self._settings)
        self._trusted = TrustedKeys(self._settings.trusted_keys) if self._settings.trusted_keys else None
        self._pool = ThreadPoolExecutor(MAX_ACTIONS, thread_name_prefix="action")
        self._intents: Sequence[ModelIntent] | None = None
        self._records: Mapping[Place, Record] = {}
        self._running: dict[Future[Outcome], Action] = {}
        self._unreachable_since: float | None = None
        self._serves_others = False
        self._written = ServingState()
        self._clock_offset = time.time() - time.monotonic()

    def run(self, stopped: threading.Event) -> None:
        while not stopped.is_set():
            try:
                self.tick()
            except Exception:
                # A model directory may be half removed while it is read; the next look is half a second away.
                log.exception("reconciling_failed")
            stopped.wait(TICK_S)

    def tick(self) -> None:
        index = self._index()
        now = time.monotonic()
        # A machine that slept, or whose clock was set, has another one.
        if abs(time.time() - now - self._clock_offset) > CLOCK_JUMP_S:
            self._clock_offset = time.time() - now
        self._collect(now)
        self._look_up_intents()
        if self._intents is None:
            # Nobody has said yet what is wanted: what Triton serves since before stays.
            return
        desired = self._desired(self._intents, decisions.loaded_places(index, self._records))
        self._records = decisions.observe(desired, index, self._records, now)
        # Written before anything is begun: what is to be unloaded must not be asked any more.
        state = self._write(desired, index is not None)
        interval_s = self._settings.probe_interval_s
        for action in decisions.decide(desired, index, self._records, now, interval_s, self._unreachable_since):
            # One that had to wait for a thread would seem to take long.
            if action.verb is Verb.RESTART_TRITON or len(self._running) < MAX_ACTIONS:
                self._begin(action, now)
        self._advance(state)

    def _look_up_intents(self) -> None:
        try:
            with self._app.app_context():
                self._intents = deployments.intents()
        except SQLAlchemyError as error:
            log.warning("registry_unreadable", reason=str(error))

    def _advance(self, state: ServingState) -> None:
        try:
            with self._app.app_context():
                deployments.advance(state, self._settings.warm)
        except SQLAlchemyError as error:
            log.warning("registry_unwritable", reason=str(error))

    def _desired(self, intents: Sequence[ModelIntent], loaded: set[Place]) -> dict[Place, Desired]:
        desired = {}
        for intent in intents:
            for place, digest in desired_places(intent, loaded).items():
                # Its folder may still have to be made.
                limit_s = LOAD_LIMIT_S + intent.sizes.get(place.version, 0) / LOAD_BYTES_PER_S
                desired[place] = Desired(digest, self._fingerprint(place), limit_s)
        return desired

    def _fingerprint(self, place: Place) -> int:
        return model_directory.fingerprint(model_directory.folder_of(self._settings.model_repository, place))

    def _index(self) -> dict[Place, str] | None:
        try:
            entries = self._triton.repository_index()
        except errors.ControlPlaneError:
            self._unreachable_since = self._unreachable_since or time.monotonic()
            return None
        self._unreachable_since = None
        states = {Place(entry.name, int(entry.version)): entry.state for entry in entries if entry.version.isdigit()}
        # Somebody else's models are left alone: only version folders have a manifest.
        ours = {place: state for place, state in states.items() if self._fingerprint(place)}
        self._serves_others = any(state == "READY" for place, state in states.items() if place not in ours)
        return ours

    def _begin(self, action: Action, now: float) -> None:
        if action.verb is not Verb.PROBE:
            log.info(action.verb.value, place=str(action.place), keep=action.keep)
        self._records = decisions.begin(self._records, action, now)
        if action.verb is not Verb.RESTART_TRITON:
            self._running[self._pool.submit(self._carry_out, action)] = action
            return
        model_processes.end_server(self._settings)
        self._unreachable_since = None
        # The call that is stuck says nothing any more.
        self._running = {future: other for future, other in self._running.items() if other.place != action.place}
        outcome = Outcome(action, Verdict.FAILED, "ModelLoadFailed", "loading took too long; Triton was restarted")
        self._records = decisions.record(self._records, outcome, now)

    def _collect(self, now: float) -> None:
        done, _ = wait(self._running, timeout=0)
        for future in done:
            action = self._running.pop(future)
            outcome = future.result()
            if outcome.verdict is not Verdict.SUCCEEDED or action.verb is not Verb.PROBE:
                verdict = outcome.verdict.value
                log.info(
                    f"{action.verb.value}_ended", place=str(action.place), verdict=verdict, message=outcome.message
                )
            self._records = decisions.record(self._records, outcome, now)

    # From here to ``_write``: in the pool.

    def _carry_out(self, action: Action) -> Outcome:
        assert action.place is not None
        try:
            if action.verb is Verb.PROBE:
                outcome = self._probe(action, action.place)
                if action.is_tested or outcome.verdict is not Verdict.SUCCEEDED:
                    return outcome
                # Loaded by somebody else, or by one that ended before it had looked.
                self._check_trust(action)
                folder = model_directory.folder_of(self._settings.model_repository, action.place)
                return dataclasses.replace(outcome, is_tested=self._is_proven(action.place, folder))
            if action.verb is Verb.RELOAD:
                # Triton would not end a hung process, and calls a dead one ready: a plain load would do nothing.
                model_processes.kill_stubs(self._settings, *action.place)
                is_alone = action.is_alone and not self._serves_others
                # Triton never ends the streams of a dead process. Its own end does, and here disturbs nobody else.
                if is_alone and model_processes.kill_server(self._settings):
                    return Outcome(action, Verdict.UNKNOWN, message="its process was lost; Triton is restarted")
            if action.verb is Verb.UNLOAD:
                time.sleep(LEAVE_S)
            if action.verb in (Verb.RELOAD, Verb.UNLOAD):
                self._hold(action.place.model, action.keep, action.load_limit_s)
            if action.verb is not Verb.UNLOAD:
                self._load(action, action.place)
            return Outcome(action, Verdict.SUCCEEDED, is_tested=True)
        except errors.TritonUnavailable as error:
            return Outcome(action, Verdict.UNKNOWN, message=str(error))
        except errors.ControlPlaneError as error:
            return Outcome(action, Verdict.FAILED, "ModelLoadFailed", _readable(str(error)))
        except Exception as error:
            log.exception("action_crashed", place=str(action.place))
            return Outcome(action, Verdict.FAILED, "ModelLoadFailed", f"{type(error).__name__}: {error}")

    def _check_trust(self, action: Action) -> None:
        if self._trusted is not None and action.digest:
            self._store.check(action.digest, self._trusted)

    def _is_proven(self, place: Place, folder: Path) -> bool:
        """Whether it answers as it was proven; False if it is too busy to be asked now. Raises ServingError."""
        try:
            smoke_test(self._triton, place, folder)
        except (errors.Overloaded, errors.RequestTimeout):
            return False
        return True

    def _load(self, action: Action, place: Place) -> None:
        """Load a version beside ``action.keep``, and look whether it is what it should be."""
        repository = self._settings.model_repository
        folder = model_directory.folder_of(repository, place)
        self._check_trust(action)
        model_directory.ensure_installed(repository, self._store, place, action.digest)
        try:
            try:
                self._hold(place.model, (*action.keep, place.version), action.load_limit_s)
            except errors.TritonUnavailable:
                raise
            except errors.ServingError:
                if model_directory.is_sealed(folder):
                    raise
                log.warning("damaged_version_replaced", place=str(place))
                model_directory.remove_version(repository, place)
                model_directory.ensure_installed(repository, self._store, place, action.digest)
                self._hold(place.model, (*action.keep, place.version), action.load_limit_s)
            self._check_digest(place, action.digest)
            smoke_test(self._triton, place, folder)
        except errors.TritonUnavailable:
            raise
        except Exception:
            # Triton is not to try it again by itself, nor to serve what failed the smoke test.
            with contextlib.suppress(errors.ControlPlaneError):
                self._hold(place.model, action.keep, action.load_limit_s)
            raise

    def _hold(self, model: str, versions: Sequence[int], load_limit_s: float) -> None:
        """Have Triton hold exactly these versions of a model; those that it has already are not touched."""
        if not versions:
            return self._triton.unload(model)
        model_directory.write_config(self._settings.model_repository, model, sorted(versions))
        self._triton.load(model, load_limit_s or LOAD_LIMIT_S)

    def _probe(self, action: Action, place: Place) -> Outcome:
        try:
            self._check_digest(place, action.digest)
        except (errors.BadRequest, errors.Overloaded):
            pass  # The engine itself said no, so it lives.
        except (errors.TritonUnavailable, errors.NotFound, errors.ModelNotReady) as error:
            return Outcome(action, Verdict.UNKNOWN, message=str(error))
        except errors.ControlPlaneError as error:
            return Outcome(action, Verdict.FAILED, "RuntimeUnhealthy", _readable(str(error)))
        return Outcome(action, Verdict.SUCCEEDED)

    def _check_digest(self, place: Place, digest: str) -> None:
        found = self._triton.probe(*place, timeout_s=self._settings.probe_timeout_s).digest
        if digest and found != digest:
            raise errors.ServingError(f"{place} serves files with digest {found:.12}; expected {digest:.12}")

    # The main thread again.

    def _write(self, desired: Mapping[Place, Desired], triton_is_reachable: bool) -> ServingState:
        """Say what is served. What is only remembered because it still has to be unloaded is left out."""
        places = {place: self._state_of(place, record) for place, record in self._records.items() if place in desired}
        state = ServingState({}, triton_is_reachable, time.time(), places)
        models = {}
        for intent in self._intents or ():
            found = None if intent.production is None else state.where(intent.name, intent.production)
            if found is not None:
                models[intent.name] = found[1]
        state = dataclasses.replace(state, models=models)
        is_news = dataclasses.replace(state, updated_at=self._written.updated_at) != self._written
        if is_news or state.updated_at - self._written.updated_at >= serving_state.HEARTBEAT_S:
            serving_state.write(self._settings, state)
            self._written = state
        return state

    def _state_of(self, place: Place, record: Record) -> ModelState:
        since = round(record.since + self._clock_offset, 3)
        return ModelState(place.version, record.state, since, record.reason, record.message, record.num_failures)


def _readable(message: str) -> str:
    """Triton's message without the Python traceback that it appends."""
    return message.split("\n\nAt:\n")[0].strip()
