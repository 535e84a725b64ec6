"""Keys, users, sessions and changes as the API shows and takes them."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from control_plane.auth.key_params import KeyParams, parse_time
from control_plane.auth.roles import scopes_of
from control_plane.auth.sessions import csrf_token
from control_plane.auth.tables import ApiKey, AuditEvent, User, UserSession
from control_plane.auth.users import UserEdit
from control_plane.errors import BadRequest
from control_plane.extensions import iso, now


class KeyIn(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    name: str
    role: str = "developer"
    scopes: list[str] | None = None
    models: list[str] | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    expires_at: str | None = None

    def params(self) -> KeyParams:
        """Raises BadRequest for a time that is none."""
        values = self.model_dump(exclude={"expires_at"})
        return KeyParams(**values, expires_at=None if self.expires_at is None else parse_time(self.expires_at))


class UserIn(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    name: str
    password: str
    role: str = "viewer"


class UserChange(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    role: str | None = None
    is_active: bool | None = None
    password: str | None = None

    def edit(self) -> UserEdit:
        """Raises BadRequest if nothing is to change."""
        if self.role is None and self.is_active is None and self.password is None:
            raise BadRequest("there is nothing to change; expected some of role, is_active, password")
        return UserEdit(self.role, self.is_active, self.password)


class LoginIn(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    name: str
    password: str


class PasswordChange(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    current_password: str
    password: str


def key_out(key: ApiKey) -> dict[str, Any]:
    """``state`` is active, revoked or expired; ``models`` None is every model. The secret is never shown again."""
    return {
        "prefix": key.prefix,
        "name": key.name,
        "role": key.role,
        "scopes": list(scopes_of(key.role)) if key.scopes is None else key.scopes,
        "models": key.models,
        "requests_per_minute": key.requests_per_minute,
        "tokens_per_minute": key.tokens_per_minute,
        "state": key.state(now()),
        "expires_at": iso(key.expires_at),
        "revoked_at": iso(key.revoked_at),
        "last_used_at": iso(key.last_used_at),
        "created_at": iso(key.created_at),
    }


def user_out(user: User) -> dict[str, Any]:
    return {
        "name": user.name,
        "role": user.role,
        "is_active": user.is_active,
        "revision": user.revision,
        "created_by": user.created_by,
        "created_at": iso(user.created_at),
    }


def session_out(session: UserSession, token: str) -> dict[str, Any]:
    """``csrf_token`` goes into the header X-CSRF-Token of every request that changes something."""
    return {
        "user": user_out(session.user),
        "csrf_token": csrf_token(token),
        "expires_at": iso(session.expires_at),
        "created_at": iso(session.created_at),
    }


def audit_out(event: AuditEvent) -> dict[str, Any]:
    """``actor`` is key:<prefix>, user:<name> or system; ``action`` is <what>.<verb>."""
    return {
        "id": event.id,
        "at": iso(event.at),
        "actor": event.actor,
        "action": event.action,
        "object": event.object_id,
        "details": event.details,
        "request_id": event.request_id,
    }
