"""``llmos jobs …``: jobs of a running installation, over its REST API.

Exit codes: 0 done · 1 refused, unreachable, or the job that was waited for did not succeed · 2 wrong usage ·
3 done, but a proof failed.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from control_plane.commands.api import AsJson, connected, follow, named_values, print_json, print_table, show_job

jobs = typer.Typer(help="Exports, training, proofs: long work in the background.", no_args_is_help=True)
JobId = Annotated[str, typer.Argument(help="As llmos jobs list shows it.")]
PARAMETERS = """Its parameters; VALUE is JSON or else text: max_steps=50, name=chat, or '"50"' for a text of digits."""


@jobs.command()
def kinds(as_json: AsJson = False) -> None:
    """What kinds of jobs there are, and their parameters."""
    with connected() as llmos:
        found = llmos.job_kinds()
    if as_json:
        return print_json(found)
    rows = [
        [kind["name"], kind["purpose"], kind["role"], ", ".join(map(_parameter, _parameters(kind)))] for kind in found
    ]
    print_table(["kind", "what it does", "role", "parameters (* required)"], rows)


@jobs.command("list")
def list_jobs(
    kind: Annotated[str | None, typer.Option(help="Of this kind only.")] = None,
    state: Annotated[str | None, typer.Option(help="QUEUED, RUNNING, SUCCEEDED, FAILED or CANCELLED.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=200, help="At most so many.")] = 20,
    as_json: AsJson = False,
) -> None:
    """The newest jobs."""
    with connected() as llmos:
        found = llmos.jobs(kind, state, limit)
    if as_json:
        return print_json(found)
    rows = [[job["id"], job["kind"], job["state"], _progress(job), job["created_at"]] for job in found]
    print_table(["job", "kind", "state", "step", "created"], rows)


@jobs.command()
def show(job_id: JobId, as_json: AsJson = False) -> None:
    """Everything about one job."""
    with connected() as llmos:
        job = llmos.job(job_id)
    if as_json:
        return print_json(job)
    rows = [[name, json.dumps(value) if isinstance(value, (dict, list)) else value] for name, value in job.items()]
    print_table(["job", job_id], [[name, "" if value is None else str(value)] for name, value in rows])


@jobs.command()
def submit(
    kind: Annotated[str, typer.Argument(help="As llmos jobs kinds shows it.")],
    parameters: Annotated[list[str] | None, typer.Argument(metavar="NAME=VALUE…", help=PARAMETERS)] = None,
    priority: Annotated[int, typer.Option(help="-100 to 100; higher is sooner.")] = 0,
    key: Annotated[str | None, typer.Option(help="The same key again gives the same job.")] = None,
    wait: Annotated[bool, typer.Option(help="Show its events until it has ended.")] = True,
    as_json: AsJson = False,
) -> None:
    """Start a job and follow it; Ctrl-C leaves it running."""
    with connected() as llmos:
        job = llmos.submit_job(kind, named_values(parameters or []), priority=priority, idempotency_key=key)
        show_job(llmos, job, wait, as_json)


@jobs.command()
def watch(
    job_id: JobId,
    with_log: Annotated[bool, typer.Option("--log", help="Also the lines that its child processes print.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show a job's events until it has ended; Ctrl-C leaves it running."""
    with connected() as llmos:
        follow(llmos, job_id, with_log=with_log, as_json=as_json)


@jobs.command()
def cancel(job_id: JobId, as_json: AsJson = False) -> None:
    """End a job, whether it has begun or not."""
    with connected() as llmos:
        job = llmos.cancel_job(job_id)
    if as_json:
        return print_json(job)
    typer.echo("CANCELLING" if job["is_cancelling"] else job["state"])


@jobs.command()
def retry(job_id: JobId, as_json: AsJson = False) -> None:
    """Run a failed or cancelled job again, from its last finished step on, and follow it."""
    with connected() as llmos:
        # Only what is said from now on.
        after = llmos.last_event_id(job_id)
        llmos.retry_job(job_id)
        follow(llmos, job_id, after, as_json=as_json)


def _parameters(kind: dict[str, Any]) -> list[tuple[str, bool]]:
    schema = kind["params"]
    return [(name, name in schema.get("required", ())) for name in schema.get("properties", {})]


def _parameter(named: tuple[str, bool]) -> str:
    name, is_required = named
    return f"{name}*" if is_required else name


def _progress(job: dict[str, Any]) -> str:
    progress = job["progress"]
    return f"{progress['step']} ({progress['done']}/{progress['total']})" if progress.get("step") else ""
