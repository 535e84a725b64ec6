"""Who is behind a request, and what they may do. Made once per request by ``auth.services``, read by everybody."""

from __future__ import annotations

from dataclasses import dataclass

from flask import g

from control_plane.auth.roles import includes
from control_plane.errors import Forbidden


@dataclass(frozen=True)
class Principal:
    """A key, or a user who has signed in. ``models`` are those it may use on /v1, None is all of them.

    ``key_prefix`` or ``token_sha256`` finds the row again, so that a long answer can ask whether it is still valid.
    """

    actor: str
    role: str
    scopes: tuple[str, ...]
    models: tuple[str, ...] | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    key_prefix: str | None = None
    token_sha256: str | None = None

    def require(self, role: str, scopes: tuple[str, ...]) -> None:
        """Raises Forbidden if the role is below ``role``, or if none of ``scopes`` is there."""
        if not includes(self.role, role):
            raise Forbidden(f"this needs the role {role!r}; {self.actor} has {self.role!r}")
        if not set(scopes) & set(self.scopes):
            wanted = " or ".join(map(repr, scopes))
            raise Forbidden(f"this needs the scope {wanted}; {self.actor} has {', '.join(self.scopes)}")

    def may_use(self, model: str) -> bool:
        return self.models is None or model in self.models

    def require_model(self, model: str) -> None:
        if not self.may_use(model):
            allowed = ", ".join(self.models or ())
            raise Forbidden(f"{self.actor} may not use model {model!r:.200}; it may use {allowed}")


def current_principal() -> Principal:
    """Whoever passed ``require_key`` in this request."""
    found: Principal = g.principal
    return found
