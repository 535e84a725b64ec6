"""Kinds of jobs for tests.

``note`` only notes that it ran. ``chain`` has two steps: ``first`` notes, ``second`` runs a child for some seconds,
which fails as long as the file ``needed`` is missing, and prints ``num_lines`` lines.
``ask`` reads the database before and after a file ``answered`` appears.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from sqlalchemy import text

from control_plane.extensions import db
from control_plane.jobs.kinds import JobKind, JobParams, JobRun

CHILD = "tests.integration.control_plane.job_child"


class NoteParams(JobParams):
    pass


class ChainParams(JobParams):
    seconds: float = 0.2
    needed: str = ""
    num_lines: int = 0


def note(run: JobRun) -> Mapping[str, Any]:
    with (run.settings.home / "notes").open("a") as stream:
        stream.write(f"{run.job_id}\n")
    return {"noted": run.job_id}


def second(run: JobRun) -> Mapping[str, Any]:
    params = run.params
    run.child(CHILD, str(run.settings.home / "children"), str(params.seconds), params.needed, str(params.num_lines))
    return {"after": run.results["first"]["noted"]}


def ask(run: JobRun) -> Mapping[str, Any]:
    db.session.execute(text("SELECT 1"))
    with (run.settings.home / "asked").open("a") as stream:
        stream.write(f"{run.job_id}\n")
    while not (run.settings.home / "answered").exists():
        time.sleep(0.05)
    db.session.execute(text("SELECT 1"))
    return {}


TEST_KINDS = {
    "ask": JobKind("ask the database twice", NoteParams, {"ask": ask}),
    "note": JobKind("note that it ran", NoteParams, {"note": note}),
    "chain": JobKind("two steps", ChainParams, {"first": note, "second": second}),
}
