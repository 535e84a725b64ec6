"""What can be asked of a new API key, and what is refused. Knows no table and no request."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from control_plane.auth.roles import check_role, check_scopes
from control_plane.errors import BadRequest
from control_plane.extensions import now

MAX_NAME_LENGTH = 100
MAX_MODELS = 100
MAX_RATE = 1_000_000_000
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True)
class KeyParams:
    """``scopes`` None is all that the role has, ``models`` None is every model, a rate of None is the default one.

    ``expires_at`` is UTC without a zone, as every time in the database.
    """

    name: str
    role: str
    scopes: Sequence[str] | None = None
    models: Sequence[str] | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    expires_at: datetime | None = None

    def checked(self) -> KeyParams:
        """The same in its usual order; raises BadRequest naming the first value that cannot be."""
        check_role(self.role)
        _check_name(self.name)
        _check_rate("requests_per_minute", self.requests_per_minute)
        _check_rate("tokens_per_minute", self.tokens_per_minute)
        if self.expires_at is not None and self.expires_at <= now():
            raise BadRequest(f"expires_at has value {self.expires_at.isoformat()}Z; expected a time to come")
        return replace(
            self,
            scopes=None if self.scopes is None else check_scopes(self.role, self.scopes),
            models=None if self.models is None else _checked_models(self.models),
        )


def parse_time(text: str) -> datetime:
    """ISO 8601 with a zone, as UTC without one; raises BadRequest."""
    expected = "expected a date and time of ISO 8601 with a zone, as 2030-12-31T00:00:00Z"
    try:
        given = datetime.fromisoformat(text)
        if given.tzinfo is not None:
            return given.astimezone(UTC).replace(tzinfo=None)
    except (ValueError, OverflowError):
        pass
    raise BadRequest(f"expires_at has value {text!r:.100}; {expected}")


def _check_name(name: str) -> None:
    if not 1 <= len(name) <= MAX_NAME_LENGTH:
        raise BadRequest(f"name has {len(name)} characters; expected 1 to {MAX_NAME_LENGTH}")
    if not name.isprintable() or name.isspace():
        raise BadRequest(f"name has value {name!r:.200}; expected printable characters on one line")


def _check_rate(name: str, rate: int | None) -> None:
    if rate is not None and not 1 <= rate <= MAX_RATE:
        raise BadRequest(f"{name} has value {rate}; expected a whole number from 1 to {MAX_RATE}")


def _checked_models(models: Sequence[str]) -> list[str]:
    if not 1 <= len(models) <= MAX_MODELS:
        raise BadRequest(f"models has {len(models)} names; expected 1 to {MAX_MODELS}, or leave it out for all models")
    for model in models:
        if not MODEL_NAME.fullmatch(model):
            raise BadRequest(f"models has value {model!r:.200}; expected names of models, as GET /v1/models lists them")
    return sorted(set(models))
