"""Keys, users, sessions and changes as the API shows and takes them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from control_plane.auth.key_params import KeyParams, parse_time
from control_plane.auth.roles import scopes_of
from control_plane.auth.sessions import csrf_token
from control_plane.auth.tables import ApiKey, AuditEvent, User, UserSession
from control_plane.auth.users import UserEdit
from control_plane.errors import BadRequest
from control_plane.extensions import iso, now
from control_plane.operations import Out, Time
from control_plane.requests import FROM_DIGITS, PageQuery, Text

Number = Annotated[int, Field(ge=1, lt=2**31), FROM_DIGITS]


class KeyQuery(PageQuery):
    before: Text | None = Field(None, description="the prefix of the last key of the page before")


class UserQuery(PageQuery):
    after: Text | None = Field(None, description="the name of the last user of the page before")


class AuditQuery(PageQuery):
    before: Number | None = Field(None, description="the id of the last event of the page before")
    actor: Text | None = Field(None, description="key:<prefix>, user:<name> or system")
    action: Text | None = Field(None, description="<what>.<verb>")
    object: Text | None = Field(None, description="what was changed")


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


class KeyOut(Out):
    """``models`` null is every model. The secret is never shown again."""

    prefix: str
    name: str
    role: str
    scopes: list[str]
    models: list[str] | None
    requests_per_minute: int | None
    tokens_per_minute: int | None
    state: str = Field(description="active, revoked or expired")
    expires_at: Time | None
    revoked_at: Time | None
    last_used_at: Time | None
    created_by: str
    created_at: Time


class NewKeyOut(KeyOut):
    key: str = Field(description="the plain text, shown this once")


class UserOut(Out):
    name: str
    role: str
    is_active: bool
    revision: int
    created_by: str
    created_at: Time


class SessionOut(Out):
    user: UserOut
    csrf_token: str = Field(description="for the header X-CSRF-Token of every request that changes something")
    expires_at: Time
    created_at: Time


class AuditOut(Out):
    id: int
    at: Time
    actor: str
    action: str
    object: str
    details: dict[str, Any]
    request_id: str | None


def key_out(key: ApiKey) -> dict[str, Any]:
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
        "created_by": key.created_by,
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
    return {
        "user": user_out(session.user),
        "csrf_token": csrf_token(token),
        "expires_at": iso(session.expires_at),
        "created_at": iso(session.created_at),
    }


def audit_out(event: AuditEvent) -> dict[str, Any]:
    return {
        "id": event.id,
        "at": iso(event.at),
        "actor": event.actor,
        "action": event.action,
        "object": event.object_id,
        "details": event.details,
        "request_id": event.request_id,
    }
