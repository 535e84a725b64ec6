"""What nobody needs any more (``needs`` says what somebody does), and the job that removes it.

    artifact    needed by no version, checkpoint or job
    installed   a registered version in the model repository that is not loaded and should not be
    export      a folder of an old ``export`` job in LLMOS_HOME/versions
    leftover    what a process that was killed left half-made in the model repository or among the checkpoints

Everything is looked at once more just before it goes. What this installation does not know, it leaves alone.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import structlog
from flask import current_app
from sqlalchemy import select

from control_plane.artifacts import ArtifactStore, artifact_store
from control_plane.auth import audit
from control_plane.errors import NotFound, TritonUnavailable
from control_plane.extensions import db
from control_plane.jobs.kinds import JobParams, JobRun
from control_plane.jobs.services import JOB_ID
from control_plane.registry import model_directory, needs
from control_plane.registry.checkpoints import digest_of
from control_plane.registry.places import Place, model_of
from control_plane.registry.tables import Model, Version
from control_plane.settings import Settings
from control_plane.triton import TritonClient

ARTIFACT, INSTALLED, EXPORT, LEFTOVER = "artifact", "installed", "export", "leftover"
VERSION_FOLDER = re.compile(r"[1-9][0-9]{0,8}")
HALF_MADE = re.compile(r"\..+\.(?:staged|removed|fetched)-([0-9]{1,9})")
EXPORTED = re.compile(rf"({JOB_ID.pattern})|\.({JOB_ID.pattern})\.staging\.\w+")
LEFTOVER_S = 3600.0
"""In another container a process has another number; nothing of ours is half-made for so long."""
DAY_S = 86400.0
MAX_LISTED = 1000

log = structlog.get_logger(__name__)


class CollectParams(JobParams):
    """With ``dry_run`` nothing is removed; the result lists what would be."""

    dry_run: bool = False

    @property
    def scope(self) -> str:
        return "jobs" if self.dry_run else "deploy"


@dataclass(frozen=True)
class Garbage:
    """``name`` is the digest of an artifact, the place of an installed version, or else a path."""

    kind: str
    name: str
    size_bytes: int


class Collector:
    """One look at one installation; needs an application context."""

    def __init__(self, settings: Settings, store: ArtifactStore, triton: TritonClient) -> None:
        self._settings = settings
        self._store = store
        self._triton = triton

    def find(self) -> list[Garbage]:
        return [*self._artifacts(), *self._installed(), *self._exports(), *self._leftovers()]

    def remove(self, garbage: Garbage) -> bool:
        """Remove it if it is still garbage."""
        if garbage.kind == ARTIFACT:
            return self._store.delete(garbage.name, self._is_needed)
        if garbage.kind == INSTALLED:
            place = Place.parse(garbage.name)
            is_garbage = place not in needs.needed_places(self._settings, self._triton) and self._is_replaceable(place)
            if is_garbage:
                model_directory.remove_version(self._settings.model_repository, place)
            return is_garbage
        folder = Path(garbage.name)
        if garbage.kind == EXPORT and not self._is_old_export(folder, needs.jobs(self._settings)):
            return False
        shutil.rmtree(folder, ignore_errors=True)
        return not folder.exists()

    def _artifacts(self) -> Iterator[Garbage]:
        users = needs.users_of_artifacts(self._settings)
        for digest in self._store.digests():
            if digest not in users:
                with contextlib.suppress(NotFound):  # Somebody else removed it meanwhile.
                    yield Garbage(ARTIFACT, digest, self._store.describe(digest).size_bytes)

    def _is_needed(self, digest: str) -> bool:
        db.session.rollback()
        return digest in needs.users_of_artifacts(self._settings)

    def _installed(self) -> Iterator[Garbage]:
        try:
            needed = needs.needed_places(self._settings, self._triton)
        except TritonUnavailable:
            # Nobody knows what is loaded, so all of it is needed.
            return
        for folder in sorted(self._settings.model_repository.glob("*/*")):
            if not VERSION_FOLDER.fullmatch(folder.name):
                continue
            place = Place(folder.parent.name, int(folder.name))
            if place not in needed and self._is_replaceable(place):
                yield Garbage(INSTALLED, str(place), model_directory.size_bytes(folder))

    def _is_replaceable(self, place: Place) -> bool:
        """Whether it is a registered version that the store has, or that is never served again."""
        digest = digest_of(model_directory.folder_of(self._settings.model_repository, place))
        query = (
            select(Version).join(Version.model).where(Model.name == model_of(place), Version.number == place.version)
        )
        version = db.session.scalar(query)
        if version is None or version.digest != digest:
            return False
        return version.retired_at is not None or self._store.has(version.digest)

    def _exports(self) -> Iterator[Garbage]:
        jobs = needs.jobs(self._settings)
        for folder in sorted(self._settings.versions_dir.glob("*/*")):
            if self._is_old_export(folder, jobs):
                yield Garbage(EXPORT, str(folder), model_directory.size_bytes(folder))

    def _is_old_export(self, folder: Path, jobs: list[needs.JobNeeds]) -> bool:
        """What a job exported, whole or half; a folder with another name is a person's own."""
        match = EXPORTED.fullmatch(folder.name)
        if match is None or _age_s(folder) < self._settings.garbage_days * DAY_S:
            return False
        return not any(job.job_id in match.groups() or job.names(str(folder)) for job in jobs)

    def _leftovers(self) -> Iterator[Garbage]:
        folders = (*self._settings.model_repository.glob("*/.*"), *self._settings.checkpoints_dir.glob(".*"))
        for folder in sorted(folders):
            match = HALF_MADE.fullmatch(folder.name)
            if match and _age_s(folder) > LEFTOVER_S and not psutil.pid_exists(int(match[1])):
                yield Garbage(LEFTOVER, str(folder), model_directory.size_bytes(folder))


def collect(run: JobRun) -> Mapping[str, Any]:
    """Remove all garbage, or say what it is; run again, it goes on with what is left."""
    collector = Collector(run.settings, artifact_store(run.settings), current_app.extensions["triton"])
    found = collector.find()
    if not run.params.dry_run:
        found = [garbage for garbage in found if _remove(run, collector, garbage)]
    return {
        "dry_run": run.params.dry_run,
        "num_items": len(found),
        "size_bytes": sum(garbage.size_bytes for garbage in found),
        "garbage": [asdict(garbage) for garbage in found[:MAX_LISTED]],
    }


def _remove(run: JobRun, collector: Collector, garbage: Garbage) -> bool:
    run.pause(0)
    db.session.rollback()
    if not collector.remove(garbage):
        return False
    audit.record("garbage.remove", garbage.name[-200:], run.actor, kind=garbage.kind, size_bytes=garbage.size_bytes)
    db.session.commit()
    log.info("garbage_removed", kind=garbage.kind, name=garbage.name, size_bytes=garbage.size_bytes)
    return True


def _age_s(folder: Path) -> float:
    """Since anything was last put into it; 0 if it is gone."""
    try:
        return time.time() - folder.stat().st_mtime
    except FileNotFoundError:
        return 0.0
