"""``llmos models …`` and ``llmos publish``: what the registry knows, over the REST API."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from control_plane.commands.api import AsJson, connected, follow, print_json, print_table

models = typer.Typer(help="Models and their versions.", no_args_is_help=True)


@models.command("list")
def list_models(
    prefix: Annotated[str | None, typer.Option(help="Whose name begins so.")] = None, as_json: AsJson = False
) -> None:
    """Every model with its newest version."""
    with connected() as llmos:
        found = llmos.models(prefix)
    if as_json:
        return print_json(found)
    rows = [
        [model["name"], str(model["num_versions"]), _served(model["serving"]), *_version_cells(model["newest"])]
        for model in found
    ]
    print_table(["model", "versions", "serving", "newest", "precision", "proven", "MiB", "created"], rows)


@models.command()
def show(name: Annotated[str, typer.Argument(help="A model.")], as_json: AsJson = False) -> None:
    """A model, its versions, their proofs and states."""
    with connected() as llmos:
        model, versions = llmos.model(name), llmos.versions(name)
    if as_json:
        return print_json({**model, "versions": versions})
    typer.echo(f"{name}: {model['description']}" if model["description"] else name)
    rows = [
        [*_version_cells(version), _state(version["serving"]), version["digest"][:12], _proof(version)]
        for version in versions
    ]
    columns = ["version", "precision", "proven", "MiB", "created", "serving", "digest", "certificate"]
    print_table(columns, rows)


@models.command()
def describe(
    name: Annotated[str, typer.Argument(help="A model.")],
    description: Annotated[str, typer.Argument(help="What it is for.")],
) -> None:
    """Change what is said about a model."""
    with connected() as llmos:
        llmos.describe_model(name, description)


def publish(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint folder, or the id of a Hub model.")],
    name: Annotated[str, typer.Argument(help="The model whose next version it becomes.")],
    precision: Annotated[str, typer.Option(help="fp32, fp16, bf16, int8 or int4.")] = "fp32",
    key: Annotated[str | None, typer.Option(help="The same key again gives the same job.")] = None,
    wait: Annotated[bool, typer.Option(help="Show its events until it has ended.")] = True,
) -> None:
    """Export a checkpoint, prove it, store it, and register it as the next version of a model."""
    import os

    source = os.path.abspath(checkpoint) if os.path.isdir(checkpoint) else checkpoint
    with connected() as llmos:
        params = {"checkpoint": source, "name": name, "precision": precision}
        job = llmos.submit_job("publish", params, idempotency_key=key)
        if not wait:
            typer.echo(job["id"])
            return
        follow(llmos, job["id"])


def _version_cells(version: dict[str, Any] | None) -> list[str]:
    if version is None:
        return [""] * 5
    proven = {True: "yes", False: "NO", None: "not proven"}[version["passed"]]
    mib = f"{(version['size_bytes'] or 0) / (1 << 20):.1f}"
    return [str(version["version"]), version["precision"] or "", proven, mib, version["created_at"][:19]]


def _served(serving: dict[str, Any] | None) -> str:
    return f"{serving['version']}: {_state(serving)}" if serving else ""


def _state(serving: dict[str, Any] | None) -> str:
    return "" if serving is None else ": ".join(filter(None, (serving["state"], serving["message"])))


def _proof(version: dict[str, Any]) -> str:
    certificate = version["certificate"]
    if certificate.get("num_tokens_compared") is None:
        return "none"
    difference = certificate.get("max_logit_difference")
    shown = "" if difference is None else f", logits differ by at most {difference:.1e}"
    return f"{certificate['num_tokens_compared']} tokens compared{shown}"
