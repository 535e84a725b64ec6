"""``python -m control_plane.registry.reconciler``: keeps Triton serving what is installed, without a person.

Twice a second it compares the model repository with Triton's index, begins what ``decisions.decide`` says, each action
in a thread of its own so that a slow load delays nothing else, and writes serving.json. The one-token probe is
answered from a cache row that the engine keeps for it, between two steps, so a busy engine answers and is never
reloaded.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import FrameType

import structlog

from control_plane import errors
from control_plane.logs import configure_logging
from control_plane.registry import decisions, model_processes, serving_state
from control_plane.registry.decisions import Action, Desired, Outcome, Record, Verb, Verdict
from control_plane.registry.model_directory import installed_models
from control_plane.registry.serving_state import ModelState, ServingState
from control_plane.secrets import triton_admin_key
from control_plane.settings import Settings
from control_plane.triton import TritonClient

TICK_S = 0.5
LOAD_LIMIT_S = 120.0
LOAD_BYTES_PER_S = 50e6
"""A version is read twice while it is loaded (digest, weights); this is a slow disk."""
MAX_ACTIONS = 32

log = structlog.get_logger()


class Reconciler:
    """Owned by the main thread; actions run in the pool and touch nothing of this object."""

    def __init__(self, settings: Settings, triton: TritonClient) -> None:
        self._settings = settings
        self._triton = triton
        self._pool = ThreadPoolExecutor(MAX_ACTIONS, thread_name_prefix="action")
        self._records: Mapping[str, Record] = {}
        self._running: dict[Future[Outcome], Action] = {}
        self._unreachable_since: float | None = None
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
        desired, index = self._desired(), self._index()
        now = time.monotonic()
        self._collect(now)
        self._records = decisions.observe(desired, index, self._records, now)
        interval_s = self._settings.probe_interval_s
        for action in decisions.decide(desired, index, self._records, now, interval_s, self._unreachable_since):
            self._begin(action, now)
        self._write(index is not None)

    def _desired(self) -> dict[str, Desired]:
        return {
            model.name: Desired(model.version, model.fingerprint, LOAD_LIMIT_S + model.size_bytes / LOAD_BYTES_PER_S)
            for model in installed_models(self._settings.model_repository)
        }

    def _index(self) -> dict[tuple[str, int], str] | None:
        try:
            entries = self._triton.repository_index()
        except errors.ControlPlaneError:
            self._unreachable_since = self._unreachable_since or time.monotonic()
            return None
        self._unreachable_since = None
        return {(entry.name, int(entry.version)): entry.state for entry in entries if entry.version.isdigit()}

    def _begin(self, action: Action, now: float) -> None:
        if action.verb is not Verb.PROBE:
            log.info(action.verb.value, model=action.model, version=action.version)
        self._records = decisions.begin(self._records, action, now)
        if action.verb is not Verb.RESTART_TRITON:
            self._running[self._pool.submit(self._carry_out, action)] = action
            return
        model_processes.end_server(self._settings)
        self._unreachable_since = None
        # The call that is stuck says nothing any more.
        self._running = {future: other for future, other in self._running.items() if other.model != action.model}
        outcome = Outcome(action, Verdict.FAILED, "ModelLoadFailed", "loading took too long; Triton was restarted")
        self._records = decisions.record(self._records, outcome, now)

    def _collect(self, now: float) -> None:
        done, _ = wait(self._running, timeout=0)
        for future in done:
            action = self._running.pop(future)
            outcome = future.result()
            if outcome.verdict is not Verdict.SUCCEEDED or action.verb is not Verb.PROBE:
                verdict = outcome.verdict.value
                log.info(f"{action.verb.value}_ended", model=action.model, verdict=verdict, message=outcome.message)
            self._records = decisions.record(self._records, outcome, now)

    def _carry_out(self, action: Action) -> Outcome:
        """Runs in the pool."""
        assert action.model is not None
        try:
            if action.verb is Verb.PROBE:
                return self._probe(action)
            if action.verb is Verb.RELOAD:
                # Triton would not end a hung process, and calls a dead one ready: a plain load would do nothing.
                model_processes.kill_stubs(self._settings, action.model, action.version)
                if action.is_alone:
                    # Triton never ends the streams of a dead process. Its own end does, and here disturbs nobody else.
                    model_processes.kill_server(self._settings)
                    return Outcome(action, Verdict.UNKNOWN, message="its process was lost; Triton is restarted")
            if action.verb in (Verb.RELOAD, Verb.UNLOAD):
                self._triton.unload(action.model)
            if action.verb is not Verb.UNLOAD:
                self._triton.load(action.model, action.load_limit_s)
            return Outcome(action, Verdict.SUCCEEDED)
        except errors.TritonUnavailable as error:
            return Outcome(action, Verdict.UNKNOWN, message=str(error))
        except Exception as error:
            return Outcome(action, Verdict.FAILED, "ModelLoadFailed", _readable(str(error)))

    def _probe(self, action: Action) -> Outcome:
        assert action.model is not None
        try:
            self._triton.probe(action.model, self._settings.probe_timeout_s)
        except (errors.BadRequest, errors.Overloaded):
            pass  # The engine itself said no, so it lives.
        except (errors.TritonUnavailable, errors.NotFound, errors.ModelNotReady) as error:
            return Outcome(action, Verdict.UNKNOWN, message=str(error))
        except errors.ControlPlaneError as error:
            return Outcome(action, Verdict.FAILED, "RuntimeUnhealthy", _readable(str(error)))
        return Outcome(action, Verdict.SUCCEEDED)

    def _write(self, triton_is_reachable: bool) -> None:
        models = {
            name: ModelState(
                record.version,
                record.state,
                round(record.since + self._clock_offset, 1),
                record.reason,
                record.message,
                record.num_failures,
            )
            for name, record in self._records.items()
        }
        state = ServingState(models, triton_is_reachable, time.time())
        is_news = dataclasses.replace(state, updated_at=self._written.updated_at) != self._written
        if is_news or state.updated_at - self._written.updated_at >= serving_state.HEARTBEAT_S:
            serving_state.write(self._settings, state)
            self._written = state


def _readable(message: str) -> str:
    """Triton's message without the Python traceback that it appends."""
    return message.split("\n\nAt:\n")[0].strip()


def main() -> None:
    settings = Settings.from_environment()
    configure_logging("reconciler")
    stopped = threading.Event()

    def stop(signum: int, frame: FrameType | None) -> None:
        stopped.set()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    triton = TritonClient(settings.triton_grpc_url, triton_admin_key(settings), settings.probe_timeout_s)
    Reconciler(settings, triton).run(stopped)
    # Loads that still run belong to Triton; waiting for their answers would only delay the end.
    os._exit(0)


if __name__ == "__main__":
    main()
