"""The registry: which models there are, their versions, and where these came from.

A version is registered once its folder lies in the artifact store. What is registered is never changed; a model's
description is, and every edit counts its ``revision`` up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy import func, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import joinedload

from control_plane.auth import audit
from control_plane.errors import Conflict, NotFound, PreconditionFailed
from control_plane.extensions import db
from control_plane.registry.model_directory import NAME, check_name
from control_plane.registry.tables import Alias, Evaluation, Model, Version
from control_plane.version_facts import read_version_facts
from triton_backend.version_folder import digest, read_manifest

MAX_DESCRIPTION = 10_000
MAX_RACES = 20

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class ModelSummary:
    """A model with how many versions it has, and the newest of them."""

    model: Model
    num_versions: int
    newest: Version | None


def register(
    name: str, folder: Path, *, job_id: str | None = None, actor: str | None = None, number: int | None = None
) -> Version:
    """Record the sealed ``folder`` as the next version of a model, which is made if need be.

    The same folder again gives the version that it was registered as, unless that is retired. ``number`` is for folders
    that have one already. Raises BadRequest for a bad name, Conflict if the number belongs to another folder.
    """
    found = digest(folder)
    actor = actor or audit.current_actor()
    for _ in range(MAX_RACES):
        model = _ensure_model(name, actor)
        is_same = (Version.model_id == model.id, Version.digest == found, Version.retired_at.is_(None))
        earlier = db.session.scalar(select(Version).where(*is_same))
        if earlier is not None:
            return earlier
        newest = db.session.scalar(select(func.max(Version.number)).where(Version.model_id == model.id)) or 0
        version = Version(model_id=model.id, number=number or newest + 1, digest=found, job_id=job_id, created_by=actor)
        _describe(version, folder)
        db.session.add(version)
        try:
            db.session.flush()
            details: Mapping[str, Any] = {"digest": found, "passed": version.passed}
            audit.record("version.create", f"{name}/{version.number}", actor, **details)
            db.session.commit()
        except IntegrityError:
            db.session.rollback()
            if number is not None:
                raise Conflict(
                    f"model {name!r} has another version {number} already; give the folder a new number"
                ) from None
            continue  # Another registration took this number.
        log.info("version_registered", model=name, version=version.number, digest=found)
        return version
    raise Conflict(f"too many versions of {name!r} are being registered at once; try again")


def find_models(after: str | None, prefix: str | None, limit: int) -> list[ModelSummary]:
    """By name; ``after`` is the last name of the page before."""
    counted = (
        select(Version.model_id, func.count().label("number"), func.max(Version.number).label("newest"))
        .group_by(Version.model_id)
        .subquery()
    )
    query = (
        select(Model, func.coalesce(counted.c.number, 0), Version)
        .outerjoin(counted, counted.c.model_id == Model.id)
        .outerjoin(Version, (Version.model_id == Model.id) & (Version.number == counted.c.newest))
        .order_by(Model.name)
        .limit(limit)
    )
    if after is not None:
        query = query.where(Model.name > after)
    if prefix:
        query = query.where(func.substr(Model.name, 1, len(prefix)) == prefix)
    return [ModelSummary(*row) for row in db.session.execute(query)]


def get_model(name: str) -> Model:
    """Raises NotFound."""
    model = db.session.scalar(select(Model).where(Model.name == name)) if NAME.fullmatch(name) else None
    if model is None:
        raise NotFound(f"model {name!r:.100} does not exist; GET /api/v1/models lists those that do")
    return model


def lock_model(name: str) -> None:
    """Let whoever else locks this model wait until this transaction ends; to be called before anything is read."""
    db.session.execute(update(Model).where(Model.name == name).values(revision=Model.revision))


def find_versions(name: str, before: int | None, limit: int) -> list[Version]:
    """Newest first; ``before`` is the last number of the page before."""
    query = select(Version).where(Version.model_id == get_model(name).id).order_by(Version.number.desc()).limit(limit)
    if before is not None:
        query = query.where(Version.number < before)
    return list(db.session.scalars(query))


def get_version(name: str, number: int) -> Version:
    """Raises NotFound."""
    query = select(Version).where(Version.model_id == get_model(name).id, Version.number == number)
    version = db.session.scalar(query)
    if version is None:
        raise NotFound(f"model {name!r} has no version {number}; GET /api/v1/models/{name}/versions lists those it has")
    return version


def numbers_by_digest(name: str) -> dict[str, int]:
    """Which version of a model has which digest. Raises NotFound."""
    query = select(Version.digest, Version.number).where(Version.model_id == get_model(name).id)
    return {found: number for found, number in db.session.execute(query)}


def resolve_version(name: str, wanted: str | int | None) -> Version:
    """The version of a number or an alias; the newest if ``wanted`` is None. Raises NotFound."""
    text = "" if wanted is None else str(wanted)
    if text.isascii() and text.isdecimal() and len(text) < 10:
        return get_version(name, int(text))
    model = get_model(name)
    query = select(Version).where(Version.model_id == model.id)
    if wanted is None:
        version = db.session.scalar(query.order_by(Version.number.desc()).limit(1))
    else:
        version = db.session.scalar(query.join(Alias, Alias.version_id == Version.id).where(Alias.name == text))
    if version is None:
        what = "version" if wanted is None else f"alias {text!r:.100}"
        raise NotFound(f"model {name!r} has no {what}; llmos models show {name} lists what it has")
    return version


def find_evaluations(name: str, number: int | None, before: int | None, limit: int) -> list[Evaluation]:
    """Of one version, or of all; newest first."""
    query = select(Evaluation).join(Version).where(Version.model_id == get_model(name).id)
    query = query.options(joinedload(Evaluation.version)).order_by(Evaluation.id.desc()).limit(limit)
    if number is not None:
        query = query.where(Evaluation.version_id == get_version(name, number).id)
    if before is not None:
        query = query.where(Evaluation.id < before)
    return list(db.session.scalars(query))


def recorded_evaluation(job_id: str, suite: str) -> Evaluation | None:
    """What a job recorded before it was run again."""
    return db.session.scalar(select(Evaluation).where(Evaluation.job_id == job_id, Evaluation.suite == suite))


def record_evaluation(
    name: str, number: int, suite: str, metrics: Mapping[str, float], *, data: str | None, job_id: str, actor: str
) -> Evaluation:
    """Keep what was measured; the same job again gives what it recorded before."""
    version = get_version(name, number)
    evaluation = recorded_evaluation(job_id, suite)
    if evaluation is None:
        found = {"version_id": version.id, "suite": suite, "metrics": dict(metrics), "data": data, "job_id": job_id}
        evaluation = Evaluation(**found, created_by=actor)
        db.session.add(evaluation)
        audit.record("evaluation.create", f"{name}/{number}", actor, suite=suite)
        db.session.commit()
    return evaluation


def edit_model(name: str, changes: Mapping[str, Any], revision: int | None) -> Model:
    """Change description or thresholds of a model; raises PreconditionFailed if it is not at ``revision`` any more."""
    model = get_model(name)
    expected = model.revision if revision is None else revision
    changed = db.session.execute(
        update(Model)
        .where(Model.id == model.id, Model.revision == expected)
        .values(**changes, revision=Model.revision + 1)
    )
    if not changed.rowcount:  # type: ignore[attr-defined]
        db.session.rollback()
        raise PreconditionFailed(
            f"model {name!r} is not at revision {expected} any more: somebody else changed it meanwhile; read it again"
        )
    audit.record("model.edit", name, **changes)
    db.session.commit()
    db.session.refresh(model)
    return model


def _ensure_model(name: str, actor: str) -> Model:
    model = db.session.scalar(select(Model).where(Model.name == check_name(name)))
    if model is not None:
        return model
    model = Model(name=name, created_by=actor)
    db.session.add(model)
    try:
        db.session.flush()
        audit.record("model.create", name, actor)
        db.session.commit()
    except IntegrityError:
        db.session.rollback()
        return get_model(name)
    return model


def _describe(version: Version, folder: Path) -> None:
    facts, manifest = read_version_facts(folder), read_manifest(folder)
    version.architecture, version.precision = facts.architecture, facts.precision
    version.size_bytes, version.passed = facts.size_bytes, facts.passed
    version.certificate = dict(facts.certificate)
    version.source = dict(manifest.get("source", {}))
