"""What the tests of jobs ask: of the services, each question in a context of its own, and of what the jobs left."""

from __future__ import annotations

import psutil

from control_plane.extensions import db
from control_plane.jobs import services
from control_plane.jobs.tables import Job

from .processes import wait_for


class Jobs:
    """What a test asks of the services, each in a context of its own."""

    def __init__(self, app) -> None:
        self.app = app

    def submit(self, kind: str, params=None, **options) -> str:
        with self.app.app_context():
            extensions = self.app.extensions
            return services.submit(extensions["celery"], extensions["job_kinds"], kind, params or {}, **options).id

    def get(self, job_id: str) -> Job:
        with self.app.app_context():
            job = services.get(job_id)
            db.session.expunge(job)
            return job

    def wait(self, job_id: str, state: str, timeout_s: float = 40) -> Job:
        wait_for(lambda: self.get(job_id).state == state, timeout_s, f"job in state {state}")
        return self.get(job_id)

    def events(self, job_id: str) -> list[dict]:
        with self.app.app_context():
            return [event.event for event in services.events(job_id, 0, 1000)]

    def call(self, function, *arguments):
        with self.app.app_context():
            return function(*arguments)


def lines(path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def child_pid(settings) -> int:
    wait_for(lambda: lines(settings.home / "children"), 40, "start of the child")
    return int(lines(settings.home / "children")[-1])


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
