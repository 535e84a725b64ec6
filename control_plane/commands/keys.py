"""``llmos keys …``: API keys over the REST API; the first one is written into the database where nothing runs yet."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import typer

from control_plane.commands.api import AsJson, connected, print_json, print_table
from control_plane.errors import Unauthorized
from control_plane.settings import Settings

keys = typer.Typer(help="API keys.", no_args_is_help=True)


@keys.command()
def create(
    name: Annotated[str, typer.Argument(help="Whom or what it is for.")],
    role: Annotated[str, typer.Option(help="viewer, developer, operator or admin.")] = "developer",
    scope: Annotated[list[str] | None, typer.Option(help="read, generate, jobs, deploy or admin; may repeat.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="A model it may use on /v1; may repeat.")] = None,
    requests_per_minute: Annotated[int | None, typer.Option(help="Instead of the installation's limit.")] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(help="Tokens of prompts and answers on /v1.")] = None,
    days: Annotated[int | None, typer.Option(min=1, max=36500, help="After so many days it expires.")] = None,
    direct: Annotated[bool, typer.Option("--direct", help="Write into the database, whatever runs.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make an API key and print it, this once."""
    limits: dict[str, Any] = {
        "scopes": scope or None,
        "models": model or None,
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
    }
    expires_at = None if days is None else datetime.now(UTC) + timedelta(days=days)
    made = None if direct else _create_over_api(name, role, limits, expires_at)
    made = made or {"key": _create_directly(name, role, limits, expires_at)}
    if as_json:
        return print_json(made)
    typer.echo(made["key"])


@keys.command("list")
def list_keys(as_json: AsJson = False) -> None:
    """Every key, newest first; never a secret."""
    with connected() as llmos:
        found = llmos.keys()
    if as_json:
        return print_json(found)
    rows = [[str(key[name] or "") for name in ("prefix", "name", "role")] + _limit_cells(key) for key in found]
    titles = ["prefix", "name", "role", "scopes", "models", "per minute", "state", "expires", "last used", "made by"]
    print_table(titles, rows)


@keys.command()
def revoke(
    prefix: Annotated[str, typer.Argument(help="As llmos keys list shows it.")], as_json: AsJson = False
) -> None:
    """Refuse a key from now on; streams that it has open end within seconds."""
    with connected() as llmos:
        key = llmos.revoke_key(prefix)
    if as_json:
        return print_json(key)
    typer.echo(key["state"])


def _create_over_api(
    name: str, role: str, limits: dict[str, Any], expires_at: datetime | None
) -> dict[str, Any] | None:
    """The new key with what it may do, or None if there is nobody to ask."""
    from control_plane.client import ApiError, Unreachable

    expires = None if expires_at is None else expires_at.isoformat()
    try:
        with connected() as llmos:
            return llmos.create_key(name, role, **limits, expires_at=expires)
    except (Unauthorized, Unreachable):
        # This is how the first key is made: nothing runs yet, or no key is there to ask with.
        return None
    except ApiError as error:
        hint = "; --direct writes into the database of LLMOS_HOME" if error.status in (401, 403) else ""
        raise ApiError(f"{error}{hint}", error.status, error.code) from None


def _create_directly(name: str, role: str, limits: dict[str, Any], expires_at: datetime | None) -> str:
    from control_plane.launcher import database

    settings = Settings.from_environment()
    database.upgrade(settings)
    at = None if expires_at is None else expires_at.replace(tzinfo=None)
    return database.create_key(settings, name, role, **limits, expires_at=at)


def _limit_cells(key: dict[str, Any]) -> list[str]:
    rates = {"requests": key["requests_per_minute"], "tokens": key["tokens_per_minute"]}
    return [
        ", ".join(key["scopes"]),
        ", ".join(key["models"] or ["all"]),
        ", ".join(f"{rate} {what}" for what, rate in rates.items() if rate is not None),
        key["state"],
        (key["expires_at"] or "")[:10],
        (key["last_used_at"] or "")[:16],
        key["created_by"],
    ]
