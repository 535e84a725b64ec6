"""Who needs what: which artifacts, which installed versions, which exports. What nobody needs is garbage.

An artifact is needed by versions that are served or may be again, by checkpoints, and by jobs that run or can be run
again. An installed version is needed where it should be loaded, where it is, and by jobs that read it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import or_, select

from control_plane.artifacts import Artifact, artifact_store
from control_plane.errors import NotFound
from control_plane.extensions import db, now
from control_plane.jobs.mending import CLOCK_TOLERANCE
from control_plane.jobs.tables import CANCELLED, FAILED, QUEUED, RUNNING, Job
from control_plane.registry import checkpoints, deployments, serving_state
from control_plane.registry.places import Place, possible_places
from control_plane.registry.tables import IN_PROGRESS, Alias, Deployment, Model, Version
from control_plane.settings import PROJECT_ROOT, Settings
from control_plane.triton import TritonClient

HELD = ("READY", "LOADING", "UNLOADING")
"""States in which Triton has a version's files, or reads them."""


@dataclass(frozen=True)
class JobNeeds:
    """What one job that runs, or can be run again, has said: its parameters and the results of its steps."""

    job_id: str
    params: dict[str, Any]
    results: tuple[dict[str, Any], ...]

    @property
    def digests(self) -> set[str]:
        return {str(result["digest"]) for result in self.results if "digest" in result}

    @property
    def places(self) -> set[Place]:
        found = [result for result in self.results if {"model", "version"} <= result.keys()]
        return {place for each in found for place in possible_places(each["model"], each["version"])}

    def names(self, path: str) -> bool:
        """Whether a parameter is this path or one below it."""
        given = (str(PROJECT_ROOT / value) for value in self.params.values() if isinstance(value, str))
        return any(value == path or value.startswith(f"{path}/") for value in given)


def jobs(settings: Settings) -> list[JobNeeds]:
    """Jobs that wait, run, or can be run again."""
    can_go_on = Job.state.in_((FAILED, CANCELLED)) & (Job.finished_at > now() - settings.retry_limit - CLOCK_TOLERANCE)
    query = select(Job.id, Job.params, Job.steps).where(or_(Job.state.in_((QUEUED, RUNNING)), can_go_on))
    return [JobNeeds(job_id, params, tuple(steps.values())) for job_id, params, steps in db.session.execute(query)]


@dataclass(frozen=True)
class UsedArtifact:
    artifact: Artifact
    users: list[str]


def find_artifacts(settings: Settings, after: str | None, limit: int) -> list[UsedArtifact]:
    """By digest; ``after`` is the last digest of the page before."""
    users, store = users_of_artifacts(settings), artifact_store(settings)
    found: list[UsedArtifact] = []
    for digest in store.digests():
        if (after is None or digest > after) and len(found) < limit:
            with contextlib.suppress(NotFound):  # It was removed meanwhile.
                found.append(UsedArtifact(store.describe(digest), users.get(digest, [])))
    return found


def users_of_artifacts(settings: Settings) -> dict[str, list[str]]:
    """Who needs which artifact, by its digest: ``chat/2``, ``checkpoint tiny``, ``job 3f…``."""
    users: dict[str, list[str]] = {}
    for digest, user in _users(settings):
        users.setdefault(digest, []).append(user)
    db.session.rollback()
    return users


def needed_places(settings: Settings, triton: TritonClient) -> set[Place]:
    """Where installed versions have to stay; raises TritonUnavailable if Triton cannot say what it has loaded."""
    entries = triton.repository_index()
    held = {Place(e.name, int(e.version)) for e in entries if e.version.isdigit() and e.state in HELD}
    held |= set(serving_state.read(settings).places)
    # Both places of what is wanted: it is copied from one to the other.
    desired = {
        place
        for intent in deployments.intents()
        for number in intent.wanted
        for place in possible_places(intent.name, number)
    }
    return held | desired | {place for job in jobs(settings) for place in job.places}


def _users(settings: Settings) -> Iterator[tuple[str, str]]:
    # Jobs first: what a job needed until it ended is by then needed by its version or checkpoint.
    for job in jobs(settings):
        yield from ((digest, f"job {job.job_id}") for digest in sorted(job.digests))
    db.session.rollback()
    is_aliased = Version.id.in_(select(Alias.version_id))
    is_deployed = Version.id.in_(select(Deployment.version_id).where(Deployment.state == IN_PROGRESS))
    is_kept = or_(Version.retired_at.is_(None), Version.retired_at > now() - timedelta(days=settings.garbage_days))
    is_warm = Version.warm_until > now()
    query = select(Version.digest, Model.name, Version.number).join(Version.model)
    query = query.where(or_(is_kept, is_aliased, is_deployed, is_warm)).order_by(Model.name, Version.number)
    for digest, name, number in db.session.execute(query):
        yield digest, f"{name}/{number}"
    for folder in sorted(settings.checkpoints_dir.glob("*")):
        found = checkpoints.digest_of(folder)
        if found is not None:
            yield found, f"checkpoint {folder.name}"
