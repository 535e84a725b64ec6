"""``llmos adapters …``: LoRA adapters of a model, over the REST API."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from control_plane.commands.api import AsJson, connected, mib, print_json, print_table, show_job

adapters = typer.Typer(help="LoRA adapters of a model, chosen per request.", no_args_is_help=True)
Model = Annotated[str, typer.Argument(help="A model.")]


@adapters.command("list")
def list_adapters(model: Model, as_json: AsJson = False) -> None:
    """Which adapters requests may name, and the version that each fits."""
    with connected() as llmos:
        found = llmos.adapters(model)
    if as_json:
        return print_json(found)
    rows = [
        [
            adapter["name"],
            str(adapter["rank"] or ""),
            str(adapter["version"] or (adapter["base_digest"] or "")[:12]),
            mib(adapter["size_bytes"]),
            adapter["problem"] or "",
        ]
        for adapter in found
    ]
    print_table(["adapter", "rank", "version", "MiB", "problem"], rows)


@adapters.command()
def add(
    model: Model,
    peft_folder: Annotated[str, typer.Argument(help="A folder as PEFT's save_pretrained writes it, on the server.")],
    name: Annotated[str | None, typer.Option(help="What requests call it; the folder's name if left out.")] = None,
    version: Annotated[int | None, typer.Option(help="The version it is meant for; production if left out.")] = None,
    other_base: Annotated[bool, typer.Option("--other-base", help="It may name another base model.")] = False,
    wait: Annotated[bool, typer.Option(help="Show the job's events until it has ended.")] = True,
    as_json: AsJson = False,
) -> None:
    """Make an adapter ready for a version and install it; one that has the name is replaced."""
    source = os.path.abspath(peft_folder) if os.path.isdir(peft_folder) else peft_folder
    adapter = name or os.path.basename(source.rstrip("/"))
    with connected() as llmos:
        show_job(llmos, llmos.put_adapter(model, adapter, source, version, other_base=other_base), wait, as_json)


@adapters.command()
def remove(model: Model, adapter: Annotated[str, typer.Argument(help="An adapter.")], as_json: AsJson = False) -> None:
    """Remove an adapter; requests that run with it go on."""
    with connected() as llmos:
        llmos.delete_adapter(model, adapter)
        if as_json:
            return print_json(llmos.adapters(model))
    typer.echo(f"{model} has no adapter {adapter} any more")
