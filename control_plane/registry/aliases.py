"""Aliases: names that point to a version. Production and canary are moved by deployments, all others by people.

An alias's ``revision`` counts its moves; whoever moves one may name the revision that they have read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from sqlalchemy import ColumnElement, delete, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import joinedload

from control_plane.auth import audit
from control_plane.errors import BadRequest, Conflict, NotFound, PreconditionFailed
from control_plane.extensions import db, now
from control_plane.registry.services import get_model, get_version, lock_model
from control_plane.registry.tables import CANARY, PRODUCTION, Alias, Model, Version

RESERVED = (PRODUCTION, CANARY)
ALIAS = re.compile(r"[a-z][a-z0-9._-]{0,63}")
"""Not a number: chat@3 is a version."""


def set_own(name: str, alias_name: str, number: int, revision: int | None = None) -> Alias:
    """Point an alias of a person's own to a version. Raises BadRequest, NotFound, Conflict, PreconditionFailed."""
    _check_name(alias_name)
    lock_model(name)
    model, version = get_model(name), get_version(name, number)
    if version.retired_at is not None:
        raise Conflict(f"version {number} of {name!r} is retired and never served again; publish it anew")
    alias = find(model, alias_name)
    check_revision(f"{name}@{alias_name}", alias, revision)
    point(model, alias_name, version, None, expected=revision)
    try:
        db.session.commit()
    except IntegrityError:
        db.session.rollback()
        raise Conflict(f"alias {alias_name!r} was made by somebody else at the same time; read it again") from None
    found = find(model, alias_name)
    assert found is not None
    return found


def delete_own(name: str, alias_name: str) -> None:
    """Remove an alias of a person's own. Raises NotFound, Conflict for those that deployments move."""
    _refuse_reserved(alias_name)
    model = get_model(name)
    alias = find(model, alias_name) if ALIAS.fullmatch(alias_name) else None
    if alias is None:
        raise NotFound(f"model {name!r} has no alias {alias_name!r:.100}; GET /api/v1/models/{name} shows those it has")
    remove(model, (alias_name,))
    db.session.commit()


def of_models(models: Iterable[Model]) -> dict[int, list[Alias]]:
    """Aliases by the id of their model, by name."""
    ids = [model.id for model in models]
    found: dict[int, list[Alias]] = {model_id: [] for model_id in ids}
    query = select(Alias).where(Alias.model_id.in_(ids)).order_by(Alias.name).options(joinedload(Alias.version))
    for alias in db.session.scalars(query):
        found[alias.model_id].append(alias)
    return found


def of_model(model: Model) -> list[Alias]:
    """By name."""
    return of_models([model])[model.id]


def find(model: Model, alias_name: str) -> Alias | None:
    return db.session.scalar(select(Alias).where(Alias.model_id == model.id, Alias.name == alias_name))


def check_revision(shown: str, alias: Alias | None, expected: int | None) -> None:
    """Raises PreconditionFailed unless the alias is where it was when it was read; an ``expected`` None is any."""
    found = alias.revision if alias else 0
    if expected not in (None, found):
        raise PreconditionFailed(
            f"{shown} is at revision {found}, If-Match expects {expected}: somebody else was faster; read it again"
        )


def point(
    model: Model,
    alias_name: str,
    version: Version,
    weight: float | None,
    actor: str | None = None,
    expected: int | None = None,
) -> None:
    """Move an alias, or make it, in the current transaction; ``weight`` is the canary's share in percent.

    Raises PreconditionFailed if it is not at the revision ``expected`` any more, or was removed meanwhile.
    """
    share = {} if weight is None else {"weight": weight}
    audit.record("alias.set", f"{model.name}@{alias_name}", actor, version=version.number, **share)
    alias = find(model, alias_name)
    if alias is None:
        db.session.add(Alias(model_id=model.id, name=alias_name, version_id=version.id, weight=weight))
        return
    # Compare and set in one statement: between reading and writing somebody else may have moved it.
    is_same = [Alias.id == alias.id, *([] if expected is None else [Alias.revision == expected])]
    values = {"version_id": version.id, "weight": weight, "updated_at": now(), "revision": Alias.revision + 1}
    moved = db.session.execute(update(Alias).where(*is_same).values(**values))
    if not moved.rowcount:  # type: ignore[attr-defined]
        db.session.rollback()
        raise PreconditionFailed(f"{model.name}@{alias_name} was moved or removed just now; read it again")
    db.session.expire(alias)


def remove(model: Model, names: Sequence[str], actor: str | None = None, *conditions: ColumnElement[bool]) -> None:
    """Remove those that also meet ``conditions``, in the current transaction."""
    removing = delete(Alias).where(Alias.model_id == model.id, Alias.name.in_(names), *conditions)
    for removed in db.session.scalars(removing.returning(Alias.name)).all():
        audit.record("alias.delete", f"{model.name}@{removed}", actor)


def _check_name(alias_name: str) -> None:
    if not ALIAS.fullmatch(alias_name):
        raise BadRequest(
            f"alias {alias_name!r:.100} is not allowed; expected 1 to 64 lower-case letters, digits, '.', '_' and '-', "
            "beginning with a letter"
        )
    _refuse_reserved(alias_name)


def _refuse_reserved(alias_name: str) -> None:
    if alias_name in RESERVED:
        raise Conflict(f"alias {alias_name!r} is moved by deployments only; POST …/deployments")
