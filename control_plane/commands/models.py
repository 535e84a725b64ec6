"""``llmos models …`` and ``llmos publish``: what the registry knows, over the REST API."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer

from control_plane.commands.api import AsJson, connected, mib, named_values, print_json, print_table, show_job
from control_plane.commands.traffic import traffic
from control_plane.errors import BadRequest

models = typer.Typer(help="Models and their versions.", no_args_is_help=True)
models.command("traffic")(traffic)
HISTORY = 20


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
    """A model: its versions, their aliases, states and proofs, and the history of what was served."""
    with connected() as llmos:
        model, versions, history = llmos.model(name), llmos.versions(name), llmos.deployments(name, HISTORY)
    if as_json:
        return print_json({**model, "versions": versions, "deployments": history})
    typer.echo(f"{name}: {model['description']}" if model["description"] else name)
    rows = [
        [*_version_cells(version), _aliases(model, version), _state(version), version["digest"][:12], _proof(version)]
        for version in versions
    ]
    columns = ["version", "precision", "proven", "MiB", "created", "aliases", "serving", "digest", "certificate"]
    print_table(columns, rows)
    if model["thresholds"]:
        limits = model["thresholds"].items()
        print_table(["metric", "limit"], [[metric, _limit(found)] for metric, found in limits])
    if history:
        typer.echo("history, newest first")
        columns = ["when", "who", "what", "version", "before", "state", "why"]
        print_table(columns, [_deployment_cells(deployment) for deployment in history])


@models.command()
def describe(
    name: Annotated[str, typer.Argument(help="A model.")],
    description: Annotated[str, typer.Argument(help="What it is for.")],
) -> None:
    """Change what is said about a model."""
    with connected() as llmos:
        llmos.edit_model(name, description=description)


@models.command()
def alias(
    name: Annotated[str, typer.Argument(help="A model.")],
    alias_name: Annotated[str, typer.Argument(metavar="ALIAS", help="A name of your own, for example stable.")],
    version: Annotated[int | None, typer.Argument(help="The version it points to; left out, it is removed.")] = None,
    as_json: AsJson = False,
) -> None:
    """Point an alias to a version, or remove it; requests for MODEL@ALIAS go there while it is loaded."""
    with connected() as llmos:
        if version is None:
            llmos.delete_alias(name, alias_name)
        else:
            llmos.set_alias(name, alias_name, version)
        if as_json:
            print_json(llmos.model(name))


@models.command()
def threshold(
    name: Annotated[str, typer.Argument(help="A model.")],
    metric: Annotated[str, typer.Argument(help="SUITE.METRIC, as llmos models evaluations shows them.")],
    least: Annotated[float | None, typer.Option("--min", help="At least so much.")] = None,
    most: Annotated[float | None, typer.Option("--max", help="At most so much.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a version must reach before it may be served; without --min and --max the limit is removed."""
    given = {key: value for key, value in (("min", least), ("max", most)) if value is not None}
    with connected() as llmos:
        model = llmos.model(name)
        thresholds = {other: limits for other, limits in model["thresholds"].items() if other != metric}
        thresholds |= {metric: given} if given else {}
        model = llmos.edit_model(name, model["revision"], thresholds=thresholds)
    if as_json:
        print_json(model)


@models.command()
def evaluations(
    name: Annotated[str, typer.Argument(help="A model.")],
    version: Annotated[int | None, typer.Option(help="Of this version only.")] = None,
    as_json: AsJson = False,
) -> None:
    """What was measured of a model's versions, newest first."""
    with connected() as llmos:
        found = llmos.evaluations(name, version)
    if as_json:
        return print_json(found)
    rows = [
        [str(each["version"]), each["suite"], metric, f"{value:g}", each["created_at"][:19]]
        for each in found
        for metric, value in each["metrics"].items()
    ]
    print_table(["version", "suite", "metric", "value", "when"], rows)


def import_checkpoint(
    source: Annotated[str, typer.Argument(metavar="PATH_OR_ID", help="A checkpoint folder, or the id of a Hub model.")],
    name: Annotated[str, typer.Argument(help="What it is called here.")],
    key: Annotated[str | None, typer.Option(help="The same key again gives the same job.")] = None,
    wait: Annotated[bool, typer.Option(help="Show its events until it has ended.")] = True,
    as_json: AsJson = False,
) -> None:
    """Check a checkpoint, store it, and give it a name that llmos publish takes."""
    with connected() as llmos:
        show_job(llmos, llmos.import_checkpoint(_path_or_id(source), name, idempotency_key=key), wait, as_json)


def publish(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint's folder, its name here, or its id on the Hub.")],
    name: Annotated[str, typer.Argument(help="The model whose next version it becomes.")],
    precision: Annotated[str, typer.Option(help="fp32, fp16, bf16, int8 or int4.")] = "fp32",
    device: Annotated[str, typer.Option(help="Where it will run: cpu or cuda.")] = "cpu",
    engine: Annotated[list[str] | None, typer.Option(help="NAME=VALUE of its engine; may repeat.")] = None,
    suites: Annotated[
        list[str] | None, typer.Option("--evaluate", metavar="SUITE=FILE", help="Measure it, too; may repeat.")
    ] = None,
    promote: Annotated[bool, typer.Option("--promote", help="Then make it production, if the gate lets it.")] = False,
    canary: Annotated[float | None, typer.Option(min=0, max=100, help="Or give it so many percent.")] = None,
    key: Annotated[str | None, typer.Option(help="The same key again gives the same job.")] = None,
    wait: Annotated[bool, typer.Option(help="Show its events until it has ended.")] = True,
    as_json: AsJson = False,
) -> None:
    """Export a checkpoint, prove it, store it, and register it as the next version of a model; --promote serves it."""
    if promote and canary is not None:
        raise BadRequest("--promote and --canary exclude each other; leave one of them out")
    with connected() as llmos:
        job = llmos.publish(
            _path_or_id(checkpoint),
            name,
            precision=precision,
            device=device,
            engine=named_values(engine or []),
            evaluate=dict(map(_suite, suites or ())),
            deploy="promote" if promote else "none" if canary is None else "canary",
            weight=canary,
            idempotency_key=key,
        )
        show_job(llmos, job, wait, as_json)


def evaluate(
    name: Annotated[str, typer.Argument(help="A model.")],
    suite: Annotated[str, typer.Option(help="perplexity, exact-match, certificate or lm-eval.")],
    version: Annotated[str | None, typer.Argument(help="A version's number or alias; the newest if left out.")] = None,
    data: Annotated[list[str] | None, typer.Option(help="What is read; lm-eval: a task file, may repeat.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Read no more tokens, pairs or documents.")] = None,
    key: Annotated[str | None, typer.Option(help="The same key again gives the same job.")] = None,
    wait: Annotated[bool, typer.Option(help="Show its events until it has ended.")] = True,
    as_json: AsJson = False,
) -> None:
    """Measure a version and record its metrics, for people and for thresholds."""
    with connected() as llmos:
        files = [os.path.abspath(path) for path in data or ()]
        job = llmos.evaluate(name, version, suite=suite, data=files or None, limit=limit, idempotency_key=key)
        show_job(llmos, job, wait, as_json)


def _path_or_id(given: str) -> str:
    return os.path.abspath(given) if os.path.isdir(given) else given


def _suite(text: str) -> tuple[str, str | None]:
    suite, equals, path = text.partition("=")
    return suite, os.path.abspath(path) if equals else None


def _version_cells(version: dict[str, Any] | None) -> list[str]:
    if version is None:
        return [""] * 5
    proven = {True: "yes", False: "NO", None: "not proven"}[version["passed"]]
    size = mib(version["size_bytes"])
    return [str(version["version"]), version["precision"] or "", proven, size, version["created_at"][:19]]


def _served(serving: dict[str, Any] | None) -> str:
    return f"{serving['version']}: {_serving_state(serving)}" if serving else ""


def _state(version: dict[str, Any]) -> str:
    return "Retired" if version["retired_at"] else _serving_state(version["serving"])


def _serving_state(serving: dict[str, Any]) -> str:
    return ": ".join(filter(None, (serving["state"], serving["message"])))


def _aliases(model: dict[str, Any], version: dict[str, Any]) -> str:
    found = [alias for alias in model["aliases"] if alias["version"] == version["version"]]
    return ", ".join(a["name"] + ("" if a["weight"] is None else f" {a['weight']:g} %") for a in found)


def _limit(limits: dict[str, float]) -> str:
    words = {"min": "at least", "max": "at most"}
    return ", ".join(f"{words[name]} {value:g}" for name, value in limits.items() if value is not None)


def _deployment_cells(deployment: dict[str, Any]) -> list[str]:
    weight = "" if deployment["weight"] is None else f" {deployment['weight']:g} %"
    failure = deployment["failure"] or {}
    forced = f"forced: {'; '.join(deployment['overridden'])}" if deployment["overridden"] else None
    why = ". ".join(filter(None, (deployment["reason"], forced, failure.get("message"))))
    return [
        deployment["created_at"][:19],
        deployment["created_by"],
        deployment["kind"] + weight,
        str(deployment["version"]),
        str(deployment["previous_version"] or ""),
        deployment["state"],
        why,
    ]


def _proof(version: dict[str, Any]) -> str:
    certificate = version["certificate"]
    if certificate.get("num_tokens_compared") is None:
        return "none"
    difference = certificate.get("max_logit_difference")
    shown = "" if difference is None else f", logits differ by at most {difference:.1e}"
    return f"{certificate['num_tokens_compared']} tokens compared{shown}"
