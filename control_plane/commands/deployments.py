"""``llmos promote | rollback | canary | abort | withdraw | retire``: what is served, changed over the REST API.

Exit codes: 0 done · 1 refused, unreachable, or the version could not be loaded · 2 wrong usage.
"""

from __future__ import annotations

import contextlib
from typing import Annotated, Any

import typer

from control_plane.commands.api import AsJson, connected, print_json

Model = Annotated[str, typer.Argument(help="A model.")]
Force = Annotated[bool, typer.Option("--force", help="Serve it although the gate objects; admins only.")]
Reason = Annotated[str | None, typer.Option(help="Kept in the history; needed with --force.")]


def promote(
    model: Model,
    version: Annotated[int, typer.Argument(help="The version to serve.")],
    force: Force = False,
    reason: Reason = None,
    as_json: AsJson = False,
) -> None:
    """Make a version production: load it, test it, move all requests to it."""
    _deploy(model, "promote", as_json, version=version, force=force, reason=reason)


def rollback(
    model: Model,
    to: Annotated[int | None, typer.Option(help="A version; the one before if left out.")] = None,
    reason: Reason = None,
    as_json: AsJson = False,
) -> None:
    """Serve what was served before; at once, while that is still loaded."""
    _deploy(model, "rollback", as_json, version=to, reason=reason)


def canary(
    model: Model,
    version: Annotated[int | None, typer.Argument(help="The version to try; that of the present canary if left out.")],
    weight: Annotated[float, typer.Option(min=0, max=100, help="Percent of the requests; 0 is a dark launch.")] = 10.0,
    force: Force = False,
    reason: Reason = None,
    as_json: AsJson = False,
) -> None:
    """Give a version a share of the requests, or change its share."""
    _deploy(model, "canary", as_json, version=version, weight=weight, force=force, reason=reason)


def abort(model: Model, reason: Reason = None, as_json: AsJson = False) -> None:
    """End a canary: production gets all requests again."""
    _deploy(model, "abort", as_json, reason=reason)


def withdraw(model: Model, reason: Reason = None, as_json: AsJson = False) -> None:
    """Serve a model no more; its versions stay in the registry."""
    _deploy(model, "withdraw", as_json, reason=reason)


def retire(
    model: Model,
    version: Annotated[int, typer.Argument(help="The version that is never to be served again.")],
    as_json: AsJson = False,
) -> None:
    """Take a version out of use for good."""
    with connected() as llmos:
        retired = llmos.retire_version(model, version)
    if as_json:
        return print_json(retired)
    typer.echo(f"version {version} of {model} is retired")


def _deploy(model: str, kind: str, as_json: bool, **options: Any) -> None:
    from control_plane.launcher.console import Screen

    with connected() as llmos:
        deployment = llmos.deploy(model, kind, **options)
        if deployment["state"] == "InProgress":
            step = f"load version {deployment['version']} of {model}"
            with contextlib.nullcontext() if as_json else Screen().step(step):
                deployment = llmos.wait_deployment(model, deployment["id"])
    if as_json:
        print_json(deployment)
    elif deployment["state"] == "UpToDate":
        typer.echo(f"{model}: {_said(deployment)}")
    if deployment["state"] != "UpToDate":
        failure = deployment["failure"] or {}
        why = failure.get("message") or "another deployment came before it"
        typer.echo(f"llmos: {kind} of version {deployment['version']} is {deployment['state']}: {why}", err=True)
        raise typer.Exit(1)


def _said(deployment: dict[str, Any]) -> str:
    version, previous = deployment["version"], deployment["previous_version"]
    if deployment["kind"] == "abort":
        return f"version {version} is no canary any more"
    if deployment["kind"] == "withdraw":
        return f"version {version} is not served any more"
    if deployment["kind"] == "canary":
        return f"version {version} gets {deployment['weight']:g} % of the requests"
    return f"version {version} is production" + (f", version {previous} was" if previous is not None else "")
