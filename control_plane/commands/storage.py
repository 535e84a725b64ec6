"""``llmos artifacts`` and ``llmos gc``: what is kept, and what nobody needs any more."""

from __future__ import annotations

from typing import Annotated

import typer

from control_plane.commands.api import AsJson, connected, follow, mib, print_json, print_table


def artifacts(as_json: AsJson = False) -> None:
    """What the artifact store holds, and who needs it."""
    with connected() as llmos:
        found = llmos.artifacts()
    if as_json:
        return print_json(found)
    rows = [[each["digest"][:12], each["kind"], mib(each["size_bytes"]), ", ".join(each["used_by"])] for each in found]
    print_table(["digest", "kind", "MiB", "needed by"], rows)


def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove artifacts, installed versions, old exports and leftovers that nobody needs."""
    with connected() as llmos:
        job = follow(llmos, llmos.collect_garbage(dry_run)["id"], as_json=as_json)
    found = (job["result"] or {})["garbage"]
    if found and not as_json:
        title = "would go" if dry_run else "removed"
        print_table([title, "", "MiB"], [[each["kind"], each["name"], mib(each["size_bytes"])] for each in found])
