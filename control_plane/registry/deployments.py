"""Changing what is served: promote, roll back, canary, abort, withdraw, retire; and what is wanted as a consequence.

    deploy ──► InProgress ──► UpToDate              the version is loaded: alias, history and audit in one transaction
                    │──────► BlockedByFailedLoad    it could not be loaded; what was served is still served
                    └──────► Superseded             another deployment came, or nobody waits for it any more

A deployment is an intent. Its version is loaded by the reconciler because of it; ``advance`` ends it as soon as the
version is loaded anywhere, at once if it is already. Every write names the state it expects, so the web server and the
reconciler may both advance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import structlog
from sqlalchemy import select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import joinedload

from control_plane.auth import audit
from control_plane.errors import BadRequest, Conflict, Forbidden, NotFound, PreconditionFailed
from control_plane.extensions import db, now
from control_plane.jobs.tables import CANCELLED, FAILED, Job
from control_plane.registry import aliases, gate
from control_plane.registry.desired import ModelIntent
from control_plane.registry.services import get_model, get_version, lock_model
from control_plane.registry.serving_state import FAILED_TO_LOAD, LOADED, ModelState, ServingState
from control_plane.registry.tables import (
    BLOCKED,
    CANARY,
    IN_PROGRESS,
    PRODUCTION,
    SUPERSEDED,
    UP_TO_DATE,
    Alias,
    Deployment,
    Evaluation,
    Model,
    Version,
)

KINDS = {"promote": PRODUCTION, "rollback": PRODUCTION, "canary": CANARY, "abort": CANARY, "withdraw": PRODUCTION}
"""What a deployment may be, and the alias that it moves."""
ENDINGS = ("abort", "withdraw")
"""Kinds that remove their alias: nothing has to be loaded for them."""
MAX_REASON = 1000
MIN_REASON = 5

log = structlog.get_logger(__name__)


def deploy(
    name: str,
    kind: str,
    look: Callable[[], ServingState],
    *,
    number: int | None = None,
    weight: float | None = None,
    reason: str | None = None,
    job_id: str | None = None,
    force: bool = False,
    may_force: bool = False,
    warm: timedelta = timedelta(0),
    revision: int | None = None,
    actor: str | None = None,
) -> Deployment:
    """Begin a deployment, and end it at once if its version is loaded, as ``look`` says after it was begun.

    One that is in progress is superseded, so that deploying what is served already, or an abort, calls it off.
    ``number`` may be left out for a rollback (the version before; while a promotion is in progress, the one that is
    served still) and for another weight of the canary there is. ``job_id`` names the job that deploys, which may do so
    once. ``revision`` is the production alias's as it was read: a change meanwhile is refused. Raises BadRequest,
    NotFound, Forbidden, Conflict if the gate objects or there is nothing to do, PreconditionFailed.
    """
    if kind not in KINDS:
        raise BadRequest(f"kind has value {kind!r:.100}; expected one of {', '.join(KINDS)}")
    # First of all, so that whoever deploys at the same time is seen below.
    lock_model(name)
    model = get_model(name)
    production, canary = aliases.find(model, PRODUCTION), aliases.find(model, CANARY)
    aliases.check_revision(f"{name}@{PRODUCTION}", production, revision)
    waiting = _in_progress(model)
    if revision is not None and PRODUCTION in waiting:
        raise PreconditionFailed(
            f"deployment {waiting[PRODUCTION].id} of {name!r} is in progress, If-Match expects that nobody deploys: "
            "read it again"
        )
    version = _target(model, kind, number, production, canary, waiting)
    is_production = production is not None and production.version_id == version.id
    _check(kind, version, weight, production, is_production and PRODUCTION not in waiting)
    # What is or was served, and the canary that there is, went through the gate then.
    is_the_canary = kind == "canary" and canary is not None and canary.version_id == version.id
    was_served = is_production or (kind == "rollback" and _was_production(version))
    is_known = is_the_canary or kind in ENDINGS or was_served
    overridden = [] if is_known else _objections(model, version, reason, force, may_force)
    alias = canary if KINDS[kind] == CANARY else production
    deployment = Deployment(
        model_id=model.id,
        kind=kind,
        alias=KINDS[kind],
        version_id=version.id,
        previous_version_id=alias.version_id if alias else None,
        weight=weight,
        overridden=overridden,
        reason=reason,
        job_id=job_id,
        created_by=actor or audit.current_actor(),
    )
    for other in waiting.values():
        if other.alias == deployment.alias or kind == "withdraw":
            _end(other, SUPERSEDED, failure_message=f"{kind} of version {version.number} came before")
    db.session.add(deployment)
    db.session.flush()
    audit.record(f"deployment.{kind}", f"{name}/{version.number}", actor, weight=weight, overridden=overridden)
    db.session.commit()
    advance(look(), warm)
    db.session.refresh(deployment)
    return deployment


def advance(serving: ServingState, warm: timedelta) -> None:
    """End the deployments whose version is loaded, or could not be; called again and again.

    ``warm`` is how long the version that is replaced stays loaded. What was seen long ago says nothing.
    """
    _give_up_those_of_ended_jobs()
    query = select(Deployment).where(Deployment.state == IN_PROGRESS).order_by(Deployment.id)
    related = (joinedload(Deployment.model), joinedload(Deployment.version))
    for deployment in db.session.scalars(query.options(*related)).all():
        where = serving.where(deployment.model.name, deployment.version.number)
        found = where if serving.is_current else None
        if deployment.kind in ENDINGS or (found is not None and found[1].state == LOADED):
            _finish(deployment, warm)
        elif found is not None and _failed_since(found[1], deployment.created_at):
            _block(deployment, found[1].reason, found[1].message)
    db.session.rollback()


def intents() -> list[ModelIntent]:
    """What is wanted of every model of which anything is wanted; read by the reconciler."""
    production: dict[str, int] = {}
    wanted: dict[str, dict[int, str]] = {}
    sizes: dict[str, dict[int, int]] = {}
    columns = (Model.name, Version.number, Version.digest, Version.size_bytes)
    of_alias = select(*columns, Alias.name).join(Alias.version).join(Version.model)
    of_alias = of_alias.where(Alias.name.in_(aliases.RESERVED))
    for name, number, digest, size, alias in db.session.execute(of_alias):
        wanted.setdefault(name, {})[number] = digest
        sizes.setdefault(name, {})[number] = size or 0
        if alias == PRODUCTION:
            production[name] = number
    of_others = select(*columns).join(Version.model).where(Version.retired_at.is_(None))
    in_progress = select(Deployment.version_id).where(Deployment.state == IN_PROGRESS, Deployment.kind.not_in(ENDINGS))
    for name, number, digest, size in db.session.execute(
        of_others.where((Version.warm_until > now()) | Version.id.in_(in_progress))
    ):
        wanted.setdefault(name, {})[number] = digest
        sizes.setdefault(name, {})[number] = size or 0
    db.session.rollback()
    return [ModelIntent(name, production.get(name), found, sizes[name]) for name, found in sorted(wanted.items())]


def history(name: str, before: int | None, limit: int) -> list[Deployment]:
    """Newest first; ``before`` is the last id of the page before."""
    query = select(Deployment).where(Deployment.model_id == get_model(name).id).order_by(Deployment.id.desc())
    if before is not None:
        query = query.where(Deployment.id < before)
    related = (Deployment.model, Deployment.version, Deployment.previous_version)
    return list(db.session.scalars(query.options(*map(joinedload, related)).limit(limit)))


def get_deployment(name: str, deployment_id: int) -> Deployment:
    """Raises NotFound."""
    query = select(Deployment).where(Deployment.model_id == get_model(name).id, Deployment.id == deployment_id)
    deployment = db.session.scalar(query)
    if deployment is None:
        raise NotFound(f"model {name!r} has no deployment {deployment_id}; GET …/deployments lists those it has")
    return deployment


def find_of_job(job_id: str) -> Deployment | None:
    """What a job has deployed."""
    return db.session.scalar(select(Deployment).where(Deployment.job_id == job_id))


def retire(name: str, number: int) -> Version:
    """Never serve a version again; garbage collection may remove its files. Conflict while an alias points to it."""
    lock_model(name)
    version = get_version(name, number)
    # In this order: what is deployed between the two looks is seen by the second.
    query = select(Deployment.id).where(Deployment.version_id == version.id, Deployment.state == IN_PROGRESS)
    if db.session.scalar(query.limit(1)) is not None:
        raise Conflict(f"version {number} of {name!r} is being deployed; wait for that, or deploy another")
    pointing = list(db.session.scalars(select(Alias.name).where(Alias.version_id == version.id)))
    if pointing:
        raise Conflict(f"version {number} of {name!r} is {', '.join(pointing)}; move that first")
    if version.retired_at is None:
        version.retired_at, version.warm_until = now(), None
        audit.record("version.retire", f"{name}/{number}")
        db.session.commit()
    return version


def adopt_production(name: str, number: int) -> None:
    """Make an installed version production, unless somebody has ever decided what the model serves; without a gate."""
    model, version = get_model(name), get_version(name, number)
    if db.session.scalar(select(Deployment.id).where(Deployment.model_id == model.id).limit(1)) is not None:
        return
    actor = audit.current_actor()
    db.session.add(
        Deployment(
            model_id=model.id,
            kind="promote",
            alias=PRODUCTION,
            version_id=version.id,
            state=UP_TO_DATE,
            overridden=[],
            reason="it was installed",
            created_by=actor,
            finished_at=now(),
        )
    )
    aliases.point(model, PRODUCTION, version, None, actor)
    db.session.commit()


def served_models() -> list[str]:
    """Names of the models that have a production version."""
    query = select(Model.name).join(Alias, Alias.model_id == Model.id).where(Alias.name == PRODUCTION)
    return list(db.session.scalars(query.order_by(Model.name)))


def _in_progress(model: Model) -> dict[str, Deployment]:
    """By the alias that they move."""
    query = select(Deployment).where(Deployment.model_id == model.id, Deployment.state == IN_PROGRESS)
    return {deployment.alias: deployment for deployment in db.session.scalars(query.order_by(Deployment.id))}


def _target(
    model: Model,
    kind: str,
    number: int | None,
    production: Alias | None,
    canary: Alias | None,
    waiting: Mapping[str, Deployment],
) -> Version:
    if kind == "withdraw":
        if production is None and waiting:
            return next(iter(waiting.values())).version
        if production is None:
            raise Conflict(
                f"model {model.name!r} is not served: it has no production version; there is nothing to withdraw"
            )
        return production.version
    if kind == "abort" or (kind == "canary" and number is None):
        if canary is None and kind == "abort" and CANARY in waiting:
            return waiting[CANARY].version
        if canary is None:
            raise Conflict(f"model {model.name!r} has no canary; deploy one with kind 'canary' and a version")
        return canary.version
    if number is not None:
        return get_version(model.name, number)
    if kind == "rollback":
        is_called_off = production is not None and PRODUCTION in waiting
        return production.version if production and is_called_off else _version_before(model, production)
    raise BadRequest("version is missing; expected the number of the version to promote")


def _version_before(model: Model, production: Alias | None) -> Version:
    """What was served before the version that is served now."""
    query = select(Deployment).where(
        Deployment.model_id == model.id,
        Deployment.alias == PRODUCTION,
        Deployment.state == UP_TO_DATE,
        # What a rollback came from was bad: a second one goes on to what was served before that.
        Deployment.kind != "rollback",
        Deployment.version_id == (production.version_id if production else None),
        # None for the first one, and no other one for a promotion that was called off.
        Deployment.previous_version_id != Deployment.version_id,
    )
    last = db.session.scalar(query.order_by(Deployment.id.desc()).limit(1))
    if last is None or last.previous_version is None:
        raise Conflict(f"model {model.name!r} has served no version before this one; promote the one you want")
    return last.previous_version


def _was_production(version: Version) -> bool:
    query = select(Deployment.id).where(
        Deployment.version_id == version.id, Deployment.alias == PRODUCTION, Deployment.state == UP_TO_DATE
    )
    return db.session.scalar(query.limit(1)) is not None


def _check(kind: str, version: Version, weight: float | None, production: Alias | None, is_there: bool) -> None:
    """``is_there``: the version is production, and nobody is about to change that."""
    if version.retired_at is not None:
        raise Conflict(f"version {version.number} is retired and never served again; publish it anew")
    is_canary_of_itself = kind == "canary" and production is not None and production.version_id == version.id
    if is_canary_of_itself or (kind in ("promote", "rollback") and is_there):
        raise Conflict(f"version {version.number} is production already; llmos models show tells what is served")
    if kind == "rollback" and production is None:
        raise Conflict("the model has no production version; promote one")
    if (weight is not None) != (kind == "canary"):
        raise BadRequest("weight is the canary's percentage of requests: expected with kind 'canary', and only then")
    if weight is not None and not (math.isfinite(weight) and 0 <= weight <= 100):
        raise BadRequest(f"weight has value {weight}; expected 0 to 100, in percent of the requests")


def _objections(model: Model, version: Version, reason: str | None, force: bool, may_force: bool) -> list[str]:
    """What the gate says, if it may be overridden; raises Conflict or Forbidden if not."""
    evaluations = db.session.scalars(select(Evaluation).where(Evaluation.version_id == version.id)).all()
    objections = gate.objections(model, version, evaluations)
    if not objections:
        return []
    said = f"version {version.number} of {model.name!r} may not be served: {'; '.join(objections)}"
    if not force:
        raise Conflict(f"{said}. An admin can force it, with a reason")
    if not may_force:
        raise Forbidden(f"{said}. Forcing it needs the role 'admin'")
    if reason is None or len(reason.strip()) < MIN_REASON:
        raise BadRequest(f"reason is missing; forcing needs one of at least {MIN_REASON} characters: {said}")
    return objections


def _give_up_those_of_ended_jobs() -> None:
    """A job that was cancelled or failed while it waited does not want it any more; run again, it deploys again."""
    query = select(Deployment, Job).join(Job, Job.id == Deployment.job_id).where(Deployment.state == IN_PROGRESS)
    for deployment, job in db.session.execute(query.where(Job.state.in_((CANCELLED, FAILED)))).all():
        _end(deployment, SUPERSEDED, failure_message=f"its job is {job.state}", job_id=None)
        db.session.commit()


def _finish(deployment: Deployment, warm: timedelta) -> None:
    """Alias, history and audit in one transaction; nothing if somebody else was faster."""
    model, version = deployment.model, deployment.version
    alias, production = aliases.find(model, deployment.alias), aliases.find(model, PRODUCTION)
    previous = alias.version if alias else None
    is_pointless = deployment.kind == "canary" and production is not None and production.version_id == version.id
    state = SUPERSEDED if is_pointless else UP_TO_DATE
    if not _end(deployment, state, previous_version_id=previous.id if previous else None) or is_pointless:
        db.session.commit()
        return
    try:
        _move(deployment, previous, warm)
        db.session.commit()
    except (IntegrityError, PreconditionFailed):
        db.session.rollback()  # The alias was made or removed by somebody else just now; the next look moves it.
        return
    log.info("deployed", model=model.name, kind=deployment.kind, version=version.number, id=deployment.id)


def _move(deployment: Deployment, previous: Version | None, warm: timedelta) -> None:
    """Aliases and what stays warm, and the audit of it, in the current transaction."""
    model, version, actor = deployment.model, deployment.version, deployment.created_by
    if deployment.kind in ENDINGS:
        aliases.remove(model, aliases.RESERVED if deployment.kind == "withdraw" else (CANARY,), actor)
        is_version = Version.model_id == model.id if deployment.kind == "withdraw" else Version.id == version.id
        db.session.execute(update(Version).where(is_version).values(warm_until=None))
    else:
        aliases.point(model, deployment.alias, version, deployment.weight, actor)
        if previous is not None and previous.id != version.id:
            previous.warm_until = now() + warm if deployment.alias == PRODUCTION else None
        if deployment.alias == PRODUCTION:
            # A canary that is promoted has done its work.
            aliases.remove(model, (CANARY,), actor, Alias.version_id == version.id)


def _failed_since(state: ModelState, at: datetime) -> bool:
    """A failure from before a deployment says nothing about it."""
    return state.state == FAILED_TO_LOAD and state.since >= at.replace(tzinfo=UTC).timestamp()


def _block(deployment: Deployment, reason: str | None, message: str | None) -> None:
    if _end(deployment, BLOCKED, failure_reason=reason, failure_message=message):
        db.session.commit()
        log.warning("deployment_blocked", model=deployment.model.name, id=deployment.id, reason=message)


def _end(deployment: Deployment, state: str, **values: Any) -> bool:
    """Compare and set, in the current transaction: whether it was in progress."""
    changed = db.session.execute(
        update(Deployment)
        .where(Deployment.id == deployment.id, Deployment.state == IN_PROGRESS)
        .values(state=state, finished_at=now(), **values)
    )
    return bool(changed.rowcount)  # type: ignore[attr-defined]
