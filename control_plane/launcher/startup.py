"""``llmos up`` and ``llmos down``: from nothing to a served model, and back to nothing.

    up:   lock ─► clear what a crash left ─► preflight ─► Triton ─► database ─► model ─► supervisord ─► ready ─► answer
    down: supervisord stops every process group ─► whatever is left is ended ─► shared memory is removed

Whichever way ``up`` ends before it has detached, Ctrl-C, SIGTERM, an error or ``down`` from another terminal, nothing
of this installation keeps running.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from types import FrameType

import psutil

from control_plane.errors import ControlPlaneError
from control_plane.launcher import database, preflight, processes, readiness, report, starter, supervisor, triton_server
from control_plane.launcher.console import Screen
from control_plane.launcher.lock import AlreadyRunning, Launch, is_held, launch_lock, read_launch, write_launch
from control_plane.registry import serving_state
from control_plane.settings import Settings
from control_plane.supervision import SupervisorClient

STOP_TIMEOUT_S = 60.0
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(ControlPlaneError):
    """Somebody stopped a start whose end was waited for."""

    code = "stopped"


def up(settings: Settings, screen: Screen, detach: bool = False) -> None:
    """Start what is missing and run until stopped, or, detached, return when everything is ready."""
    try:
        with launch_lock(settings):
            if _runs_detached(settings):
                raise AlreadyRunning(f"llmos is already running in {settings.home}")
            with _signals_interrupt():
                _up(settings, screen, detach)
    except AlreadyRunning as already:
        for line in (f"{already}:", *report.url_lines(settings), "  llmos status · llmos logs · llmos down"):
            screen.line(line)


def down(settings: Settings, screen: Screen) -> None:
    """Stop this installation, whoever started it."""
    launch = read_launch(settings)
    if is_held(settings) and launch is not None:
        with screen.step("stop llmos"):
            _stop_launcher(settings, launch)
        return
    if not SupervisorClient(settings).is_alive() and not processes.our_processes(settings):
        processes.end_leftovers(settings)
        screen.line(f"Nothing is running in {settings.home}.")
        return
    with screen.step("stop llmos"):
        take_down(settings)


def take_down(settings: Settings) -> None:
    """Stop every process of this installation and remove its shared memory; a Ctrl-C meanwhile kills instead."""
    grace_s = 10.0
    try:
        with contextlib.suppress(ControlPlaneError, psutil.Error):
            client = SupervisorClient(settings)
            supervisord = psutil.Process(client.pid())
            client.shut_down()
            # It stops the programs one after the other and ends last.
            supervisord.wait(STOP_TIMEOUT_S)
            grace_s = 2.0
    except KeyboardInterrupt:
        grace_s = 0.0
    processes.end_leftovers(settings, grace_s)
    supervisor.socket_path(settings).unlink(missing_ok=True)
    serving_state.path_of(settings).unlink(missing_ok=True)


def _up(settings: Settings, screen: Screen, detach: bool) -> None:
    write_launch(settings, Launch(os.getpid()))
    is_left_running = False
    try:
        _clear_leftovers(settings, screen)
        model, is_new = _prepare(settings, screen)
        supervisord = supervisor.start(settings)
        is_loaded = readiness.wait_until_ready(settings, model, supervisord, screen, may_fail=not is_new)
        _welcome(settings, screen, model, is_loaded)
        if detach:
            write_launch(settings, Launch(os.getpid(), detached=True))
            is_left_running = True
        else:
            screen.line("Ctrl-C stops everything.")
            _wait(settings, supervisord)
    except KeyboardInterrupt:
        screen.line()
        if detach:
            raise Stopped("llmos was stopped before everything was ready; llmos up --detach starts it again") from None
    finally:
        if not is_left_running:
            with screen.step("stop everything"):
                take_down(settings)


def _prepare(settings: Settings, screen: Screen) -> tuple[str | None, bool]:
    """Everything before the first process; returns the model to wait for, None if everything was withdrawn, and whether
    it is a new starter.
    """
    preflight.check(settings)
    screen.done("preflight")
    started_at = time.monotonic()
    if not triton_server.is_installed(settings):
        screen.line(f"… install {triton_server.WHEEL} into {settings.triton_dir}")
    triton_server.install(settings)
    preflight.check_stub(settings)
    screen.done("Triton is installed", started_at)
    with screen.step("bring the database up to date"):
        database.upgrade(settings)
    served = _register(settings, screen)
    is_new = not served and not database.has_models(settings)
    if is_new:
        starter.make_starter(settings, screen)
        served = _register(settings, screen)
        if not served:
            where = settings.model_repository
            raise ControlPlaneError(f"the starter in {where} cannot be registered; see the lines above")
    return settings.starter_model if settings.starter_model in served else next(iter(served), None), is_new


def _register(settings: Settings, screen: Screen) -> list[str]:
    with screen.step("register what is installed"):
        return database.register_installed(settings, starter.own_digest(settings))


def _welcome(settings: Settings, screen: Screen, model: str | None, is_loaded: bool) -> None:
    if model is None:
        answer = "No model is served: llmos models list shows what there is, llmos promote MODEL VERSION serves it."
    elif not is_loaded:
        answer = f"Everything else runs: llmos models show {model} says more, llmos promote or llmos rollback mends it."
    else:
        answer = report.PROMPT + _generate(settings, model)
    # Made last: it is shown once, and should not scroll away with an error.
    key = database.create_first_key(settings)
    database.ensure_local_key(settings)
    screen.line()
    screen.line(answer)
    screen.line()
    for line in report.url_lines(settings):
        screen.line(line)
    if key is not None:
        screen.line(f"  {'admin API key':<15} {key}   (shown this once; llmos keys create makes more)")
    screen.line()
    for line in report.example_lines(settings, model or "MODEL", key):
        screen.line(line)
    screen.line()


def _generate(settings: Settings, model: str) -> str:
    from control_plane.triton import GenerateCall, connect

    triton = connect(settings)
    try:
        sampling = {"max_tokens": 32, "temperature": 0.0}
        answer = triton.generate(GenerateCall(model, text=report.PROMPT, sampling=sampling), timeout_s=60)
    finally:
        triton.close()
    return answer.outputs[0].text


def _wait(settings: Settings, supervisord: subprocess.Popen[bytes]) -> None:
    supervisord.wait()
    if supervisord.returncode != 0:
        log = supervisor.log_path(settings, "supervisord")
        raise ControlPlaneError(f"supervisord ended with exit code {supervisord.returncode}; see {log}")


def _runs_detached(settings: Settings) -> bool:
    launch = read_launch(settings)
    return launch is not None and launch.detached and SupervisorClient(settings).is_alive()


def _clear_leftovers(settings: Settings, screen: Screen) -> None:
    """End what a start that was killed has left: its supervisord and everything below."""
    if SupervisorClient(settings).is_alive() or processes.our_processes(settings):
        with screen.step("stop what an earlier llmos, which was killed, left running"):
            take_down(settings)
    else:
        processes.end_leftovers(settings)
        serving_state.path_of(settings).unlink(missing_ok=True)


def _stop_launcher(settings: Settings, launch: Launch) -> None:
    """Ask the ``llmos up`` that holds the lock to stop; without an answer, stop everything here."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(launch.pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_TIMEOUT_S + 15
    while is_held(settings) and time.monotonic() < deadline:
        time.sleep(0.1)
    if is_held(settings):
        with contextlib.suppress(ProcessLookupError):
            os.kill(launch.pid, signal.SIGKILL)
        take_down(settings)


@contextlib.contextmanager
def _signals_interrupt() -> Iterator[None]:
    """SIGTERM and a closed terminal end ``up`` as Ctrl-C does; shells start background jobs with SIGINT ignored."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in _STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
