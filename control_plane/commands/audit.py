"""``llmos audit``: who changed what, over the REST API."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from control_plane.commands.api import AsJson, connected, print_json, print_table


def audit(
    actor: Annotated[str | None, typer.Option(help="Only by key:PREFIX, user:NAME or system.")] = None,
    action: Annotated[str | None, typer.Option(help="Only these, as key.create or job.submit.")] = None,
    object_id: Annotated[str | None, typer.Option("--object", help="Only of this key, user, job or model.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=200, help="At most so many.")] = 20,
    as_json: AsJson = False,
) -> None:
    """The newest changes of keys, users, jobs and models."""
    with connected() as llmos:
        found = llmos.audit(actor, action, object_id, limit)
    if as_json:
        return print_json(found)
    rows = [
        [event["at"][:19], event["actor"], event["action"], event["object"], json.dumps(event["details"])]
        for event in found
    ]
    print_table(["at", "by", "action", "object", "details"], rows)
