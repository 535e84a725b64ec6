"""A typed client of the supervisord that runs the processes of one machine, and where that listens.

The launcher starts and stops processes by it; the web server only asks what runs.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import tempfile
import xmlrpc.client
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from control_plane.errors import ControlPlaneError
from control_plane.registry.model_processes import home_digest
from control_plane.settings import Settings

# The address of a Unix socket has 108 bytes; supervisord first binds "<path>.<pid>".
MAX_SOCKET_PATH_BYTES = 96


@dataclass(frozen=True)
class ProcessStatus:
    """``state`` is supervisord's word: STARTING, RUNNING, BACKOFF, STOPPING, STOPPED, EXITED, FATAL or UNKNOWN."""

    name: str
    state: str
    pid: int
    started_at: float
    description: str

    @property
    def is_running(self) -> bool:
        return self.state == "RUNNING"


def socket_path(settings: Settings) -> Path:
    """Where supervisord listens: in LLMOS_HOME/run, or in a private folder elsewhere if that path is too long."""
    path = settings.run_dir / "supervisor.sock"
    if len(os.fsencode(path)) <= MAX_SOCKET_PATH_BYTES:
        return path
    name = f"llmos-{os.getuid()}-{home_digest(settings)}"
    runtime = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir())
    if len(os.fsencode(runtime)) > 60 or not os.access(runtime, os.W_OK):
        runtime = Path("/tmp")
    return runtime / name / "supervisor.sock"


class SupervisorClient:
    """Steers the supervisord of one installation; one thread at a time."""

    def __init__(self, settings: Settings) -> None:
        self._socket = socket_path(settings)

    def is_alive(self) -> bool:
        with contextlib.suppress(ControlPlaneError):
            return self._call("getState")["statename"] in ("RUNNING", "RESTARTING")
        return False

    def pid(self) -> int:
        """Process id of supervisord; raises ControlPlaneError if it is not running."""
        return int(self._call("getPID"))

    def processes(self) -> list[ProcessStatus]:
        """Every program, in the order they start; empty if supervisord is not running."""
        try:
            found = self._call("getAllProcessInfo")
        except ControlPlaneError:
            return []
        return [ProcessStatus(p["name"], p["statename"], p["pid"], p["start"], p["description"]) for p in found]

    def restart(self, name: str) -> None:
        """Also of one that does not run, because somebody stopped it or was interrupted while they started it anew."""
        if any(process.name == name and process.pid for process in self.processes()):
            self._call("stopProcess", name)
        self._call("startProcess", name, False)

    def shut_down(self) -> None:
        """Ask supervisord to stop every program and then itself; returns at once."""
        self._call("shutdown")

    def _call(self, method: str, *arguments: Any) -> Any:
        # Imported here: it is slow, and most commands need it once or never.
        from supervisor.xmlrpc import SupervisorTransport

        transport = SupervisorTransport(None, None, f"unix://{self._socket}")
        try:
            server = xmlrpc.client.ServerProxy("http://127.0.0.1", transport=transport)
            return getattr(server.supervisor, method)(*arguments)
        except (OSError, http.client.HTTPException, xmlrpc.client.Error) as error:
            raise ControlPlaneError(f"supervisord does not answer on {self._socket}: {error}") from error
        finally:
            transport.close()
