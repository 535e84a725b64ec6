"""People with a name and a password: making, listing and changing them.

An installation that has an active administrator keeps one: the last can be neither demoted nor deactivated.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import structlog
from flask import current_app
from sqlalchemy import ColumnElement, delete, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import aliased

from control_plane.auth import audit
from control_plane.auth.hashes import Passwords
from control_plane.auth.roles import check_role, includes
from control_plane.auth.tables import ApiKey, User, UserSession
from control_plane.errors import BadRequest, Conflict, NotFound, PreconditionFailed
from control_plane.extensions import db, now

ADMIN = "admin"
MAX_NAME_LENGTH = 64
NAME = re.compile(r"[a-z0-9]+(?:[._-][a-z0-9]+)*")

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class UserEdit:
    """What is to change; None stays as it is."""

    role: str | None = None
    is_active: bool | None = None
    password: str | None = None

    @property
    def ends_sessions(self) -> bool:
        return self.password is not None or self.is_active is False

    @property
    def takes_admin(self) -> bool:
        return self.is_active is False or self.role not in (None, ADMIN)

    def named(self) -> dict[str, Any]:
        """What the audit log says of it: never the password."""
        changes = {"role": self.role, "is_active": self.is_active, "password": None if self.password is None else "new"}
        return {name: value for name, value in changes.items() if value is not None}


def create_user(name: str, password: str, role: str) -> User:
    """Raises BadRequest for a bad name, role or password, Conflict for a name that is taken."""
    if len(name) > MAX_NAME_LENGTH or not NAME.fullmatch(name):
        raise BadRequest(
            f"name has value {name!r:.200}; expected at most {MAX_NAME_LENGTH} of a–z and 0–9, "
            "with single '.', '-' or '_' between them"
        )
    check_role(role)
    user = User(name=name, password_hash=passwords().hash(password), role=role, created_by=audit.current_actor())
    db.session.add(user)
    try:
        db.session.flush()
    except IntegrityError:
        db.session.rollback()
        raise Conflict(f"there is a user {name!r} already; choose another name, or change that one") from None
    audit.record("user.create", name, role=role)
    db.session.commit()
    log.info("user_created", user=name, role=role)
    return user


def find_users(after: str | None, limit: int) -> list[User]:
    """By name; ``after`` is the last name of the page before."""
    query = select(User).order_by(User.name).limit(limit)
    if after is not None:
        query = query.where(User.name > after)
    return list(db.session.scalars(query))


def get_user(name: str) -> User:
    """Raises NotFound."""
    user = db.session.scalar(select(User).where(User.name == name)) if NAME.fullmatch(name) else None
    if user is None:
        raise NotFound(f"user {name!r:.100} does not exist; GET /api/v1/users lists those that do")
    return user


def edit_user(name: str, edit: UserEdit, revision: int | None) -> User:
    """Change a user; a new password or a deactivation ends all of their sessions in the same transaction.

    A deactivation also ends the keys that they made, a lower role those that may do more than it. Raises
    PreconditionFailed if the user is not at ``revision`` any more, Conflict for the last active administrator.
    """
    values: dict[str, Any] = {"revision": User.revision + 1}
    if edit.role is not None:
        values["role"] = check_role(edit.role)
    if edit.is_active is not None:
        values["is_active"] = edit.is_active
    user = get_user(name)
    expected, user_id = user.revision if revision is None else revision, user.id
    if edit.password is not None:
        # Give the connection back: hashing takes its time.
        db.session.rollback()
        values["password_hash"] = passwords().hash(edit.password)
    if not _change(user_id, expected, edit.takes_admin, values):
        db.session.rollback()
        if get_user(name).revision == expected:
            raise Conflict(f"{name!r} is the last active administrator; make another one first")
        raise PreconditionFailed(
            f"user {name!r} is not at revision {expected} any more: somebody else changed it meanwhile; read it again"
        )
    if edit.ends_sessions:
        db.session.execute(delete(UserSession).where(UserSession.user_id == user_id))
    if edit.is_active is False or edit.role is not None:
        _revoke_keys_of(f"user:{name}", unless=edit.role if edit.is_active is not False else None)
    audit.record("user.edit", name, **edit.named())
    db.session.commit()
    log.info("user_edited", user=name, **edit.named())
    db.session.expire_all()
    return get_user(name)


def passwords() -> Passwords:
    found: Passwords = current_app.extensions["passwords"]
    return found


def _change(user_id: int, revision: int, takes_admin: bool, values: dict[str, Any]) -> bool:
    """Compare and set in one statement, so that two administrators cannot demote each other at once."""
    conditions: list[ColumnElement[bool]] = [User.id == user_id, User.revision == revision]
    if takes_admin:
        # SQLite has one writer at a time; PostgreSQL must be told to let the other change finish first.
        db.session.execute(select(User.id).where(_is_admin(User)).order_by(User.id).with_for_update())
        other = aliased(User)
        is_another = select(other.id).where(_is_admin(other), other.id != user_id).exists()
        conditions.append(or_(User.role != ADMIN, User.is_active.is_(False), is_another))
    changed = db.session.execute(update(User).where(*conditions).values(**values))
    return bool(changed.rowcount)  # type: ignore[attr-defined]


def _revoke_keys_of(maker: str, unless: str | None) -> None:
    """Those that were made with these keys, too, but for those that a role may have; in the current transaction."""
    makers = [maker]
    while makers:
        is_theirs = ApiKey.created_by.in_(makers) & ApiKey.revoked_at.is_(None)
        keys = db.session.execute(select(ApiKey.prefix, ApiKey.role).where(is_theirs)).all()
        prefixes = [prefix for prefix, role in keys if unless is None or not includes(unless, role)]
        db.session.execute(update(ApiKey).where(ApiKey.prefix.in_(prefixes)).values(revoked_at=now()))
        for prefix in prefixes:
            audit.record("key.revoke", prefix)
        makers = [f"key:{prefix}" for prefix in prefixes]


def _is_admin(user: Any) -> ColumnElement[bool]:
    condition: ColumnElement[bool] = (user.role == ADMIN) & user.is_active.is_(True)
    return condition
