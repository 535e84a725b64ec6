"""``python -m control_plane.reconciler``: the process that keeps Triton serving what the registry wants.

A thread of it watches the workers, since a worker cannot watch itself.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

from control_plane import create_app
from control_plane.jobs.worker_watch import WorkerWatch
from control_plane.logs import configure_logging
from control_plane.registry.reconciler import Reconciler
from control_plane.settings import Settings
from control_plane.supervision import SupervisorClient


def main() -> None:
    settings = Settings.from_environment()
    configure_logging("reconciler")
    stopped = threading.Event()

    def stop(signum: int, frame: FrameType | None) -> None:
        stopped.set()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    app = create_app(settings)
    watch = WorkerWatch(app, SupervisorClient(settings).restart)
    threading.Thread(target=watch.run, args=(stopped,), name="workers", daemon=True).start()
    Reconciler(app).run(stopped)
    # Loads that still run belong to Triton; waiting for their answers would only delay the end.
    os._exit(0)


if __name__ == "__main__":
    main()
