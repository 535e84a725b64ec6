"""``llmos users …``: people who sign in with a password, over the REST API."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from control_plane.commands.api import AsJson, connected, print_json, print_table
from control_plane.errors import BadRequest

users = typer.Typer(help="People who sign in with a password.", no_args_is_help=True)
UserName = Annotated[str, typer.Argument(help="As llmos users list shows it.")]
FromStdin = Annotated[bool, typer.Option("--password-stdin", help="Read a line from stdin instead of asking.")]


@users.command()
def create(
    name: Annotated[str, typer.Argument(help="Small letters and digits.")],
    role: Annotated[str, typer.Option(help="viewer, developer, operator or admin.")] = "viewer",
    password_stdin: FromStdin = False,
) -> None:
    """Make a user; the password is asked for."""
    password = _read_password(password_stdin)
    with connected() as llmos:
        typer.echo(llmos.create_user(name, password, role)["name"])


@users.command("list")
def list_users(as_json: AsJson = False) -> None:
    """Every user by name."""
    with connected() as llmos:
        found = llmos.users()
    if as_json:
        return print_json(found)
    rows = [
        [user["name"], user["role"], "yes" if user["is_active"] else "no", user["created_at"][:16], user["created_by"]]
        for user in found
    ]
    print_table(["user", "role", "active", "created", "by"], rows)


@users.command("set")
def set_user(
    name: UserName,
    role: Annotated[str | None, typer.Option(help="viewer, developer, operator or admin.")] = None,
    active: Annotated[bool | None, typer.Option("--active/--inactive", help="Whether they may sign in.")] = None,
    password: Annotated[bool, typer.Option("--password", help="Ask for a new password.")] = False,
    password_stdin: FromStdin = False,
) -> None:
    """Change a user; a new password, or --inactive, signs them out everywhere."""
    changes: dict[str, Any] = {"role": role, "is_active": active}
    if password or password_stdin:
        changes["password"] = _read_password(password_stdin)
    changes = {change: value for change, value in changes.items() if value is not None}
    if not changes:
        raise BadRequest("there is nothing to change; give some of --role, --active, --inactive, --password")
    with connected() as llmos:
        user = llmos.edit_user(name, **changes)
    typer.echo(f"{user['name']}: {user['role']}, {'active' if user['is_active'] else 'inactive'}")


def _read_password(from_stdin: bool) -> str:
    """Never an argument: those are seen by everybody on the machine."""
    if from_stdin:
        return sys.stdin.readline().rstrip("\r\n")
    return str(typer.prompt("Password", hide_input=True, confirmation_prompt=True))
