"""What roles and scopes there are.

A role says what somebody may do at most, and includes the roles before it: ``viewer`` sees, ``developer`` generates and
runs jobs, ``operator`` changes what is served, ``admin`` hands out keys and accounts. A key may have fewer scopes than
its role. Nothing here knows a request or a table.
"""

from __future__ import annotations

from collections.abc import Iterable

from control_plane.errors import BadRequest

ROLES = ("viewer", "developer", "operator", "admin")
SCOPES = {
    "read": "viewer",
    "generate": "developer",
    "jobs": "developer",
    "deploy": "operator",
    "admin": "admin",
}
"""The lowest role that has each scope."""
DEFAULT_SCOPE = {"viewer": "read", "developer": "jobs", "operator": "deploy", "admin": "admin"}
"""The scope of a route that names only the role it needs."""


def includes(role: str, needed: str) -> bool:
    return ROLES.index(role) >= ROLES.index(needed)


def scopes_of(role: str) -> tuple[str, ...]:
    """Every scope that the role has."""
    return tuple(scope for scope, needed in SCOPES.items() if includes(role, needed))


def check_role(role: str) -> str:
    if role not in ROLES:
        raise BadRequest(f"role has value {role!r:.100}; expected one of {', '.join(ROLES)}")
    return role


def check_scopes(role: str, scopes: Iterable[str]) -> list[str]:
    """The scopes in their usual order; raises BadRequest for one that is unknown or more than the role has."""
    given, allowed = set(scopes), scopes_of(role)
    for scope in sorted(given - set(allowed)):
        raise BadRequest(f"scopes has value {scope!r:.100}; expected some of {', '.join(allowed)}, as {role!r} has")
    if not given:
        raise BadRequest("scopes is empty; name at least one, or leave it out for all that the role has")
    return [scope for scope in allowed if scope in given]
