"""What the commands share: the connection, tables, JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Annotated, Any

import typer

from control_plane.errors import BadRequest, Unauthorized
from control_plane.secrets import local_api_key
from control_plane.settings import Settings

if TYPE_CHECKING:
    from control_plane.client import ControlPlane

AsJson = Annotated[bool, typer.Option("--json", help="For programs.")]


@contextmanager
def connected() -> Iterator[ControlPlane]:
    """A client of this installation, with LLMOS_API_KEY or else the key that ``llmos up`` left for it."""
    from control_plane.client import ControlPlane

    settings = Settings.from_environment()
    key = settings.api_key or local_api_key(settings)
    if key is None:
        raise Unauthorized("there is no API key here; set LLMOS_API_KEY, or run llmos up once in this LLMOS_HOME")
    with ControlPlane(settings.web_url, key) as llmos:
        yield llmos


def print_json(document: Any) -> None:
    typer.echo(json.dumps(document, indent=2, ensure_ascii=False))


def mib(size_bytes: int | None) -> str:
    """For a column of MiB; 0.0 for a size that nobody knows."""
    return f"{(size_bytes or 0) / (1 << 20):.1f}"


def print_table(columns: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns)
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    Console(highlight=False).print(table)


def show_job(llmos: ControlPlane, job: dict[str, Any], wait: bool, as_json: bool) -> None:
    """A job that was just submitted: follow it, or only say its id."""
    if wait:
        follow(llmos, job["id"], as_json=as_json)
    elif as_json:
        print_json(job)
    else:
        typer.echo(job["id"])


def follow(
    llmos: ControlPlane, job_id: str, after: int = 0, *, with_log: bool = False, as_json: bool = False
) -> dict[str, Any]:
    """Show a job's events until it has ended, and return it; ``with_log`` also the lines that its children print.

    ``as_json`` shows nothing but the job as it ended. Exit code 1 unless it succeeded, or when Ctrl-C leaves it
    running; 3 if it succeeded and found a proof that fails.
    """
    from control_plane.launcher.console import Screen
    from control_plane.subprocesses import ChildEvent

    screen = Screen()
    job = llmos.job(job_id)
    if not as_json:
        screen.line(f"job {job_id}")
    try:
        with nullcontext(lambda event: None) if as_json else screen.child(job["kind"]) as on_event:
            for event in llmos.follow_job(job_id, after):
                if with_log or event["event"] != "log":
                    on_event(ChildEvent(event["event"], event))
            job = llmos.job(job_id)
            if as_json:
                print_json(job)
            if job["state"] != "SUCCEEDED":
                typer.echo(f"llmos: the job ended {job['state']}: {job['error']}", err=True)
                raise typer.Exit(1)
    except KeyboardInterrupt:
        typer.echo(f"The job goes on. llmos jobs watch {job_id} · llmos jobs cancel {job_id}", err=True)
        raise typer.Exit(1) from None
    result = (job["result"] or {}).items()
    if not as_json:
        print_table(["result", ""], [[name, str(value)] for name, value in result if not isinstance(value, list)])
    if (job["result"] or {}).get("passed") is False:
        typer.echo("llmos: the proof failed: the version is not equal to its checkpoint", err=True)
        raise typer.Exit(3)
    return job


def named_values(texts: list[str]) -> dict[str, Any]:
    """NAME=VALUE with VALUE as JSON where it is some, else as text, as NaN is; raises BadRequest."""
    values: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise BadRequest(f"{text!r} is no parameter; expected NAME=VALUE")
        try:
            values[name] = json.loads(value)
            json.dumps(values[name], allow_nan=False)
        except ValueError:
            values[name] = value
    return values
