"""The ``llmos`` command: translates arguments, delegates, and prints.

A person's mistake is one line on stderr and exit code 1, wrong usage is 2. Nothing slow is imported before it is
needed, and PyTorch never: exports and training run as children.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from control_plane.errors import BadRequest, ControlPlaneError, NotFound
from control_plane.settings import Settings

app = typer.Typer(help="An LLM operating system for one machine.", no_args_is_help=True, pretty_exceptions_enable=False)
keys = typer.Typer(help="API keys.", no_args_is_help=True)
app.add_typer(keys, name="keys")


@app.command()
def up(detach: Annotated[bool, typer.Option("--detach", help="Return when everything is ready.")] = False) -> None:
    """Install what is missing, make the starter model, start everything; Ctrl-C stops it."""
    from control_plane.launcher import startup
    from control_plane.launcher.console import Screen

    startup.up(Settings.from_environment(), Screen(), detach)


@app.command()
def down() -> None:
    """Stop everything, whichever terminal started it."""
    from control_plane.launcher import startup
    from control_plane.launcher.console import Screen

    startup.down(Settings.from_environment(), Screen())


@app.command()
def status(as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False) -> None:
    """Processes, models and addresses; exit code 0 if all is well, else 1."""
    from control_plane.launcher import report
    from control_plane.launcher.console import Screen
    from control_plane.launcher.supervisor import SupervisorClient
    from control_plane.registry import serving_state

    settings, screen = Settings.from_environment(), Screen()
    processes, serving = SupervisorClient(settings).processes(), serving_state.read(settings)
    if as_json:
        typer.echo(json.dumps(report.status_document(settings, processes, serving), indent=2))
    elif not processes:
        screen.line(f"Nothing is running in {settings.home}.")
    else:
        screen.console.print(report.process_table(processes), "", report.model_table(serving), "")
        for line in report.url_lines(settings):
            screen.line(line)
    raise typer.Exit(0 if report.is_all_well(processes, serving) else 1)


@app.command()
def logs(
    name: Annotated[str | None, typer.Argument(help="One process; all of them if left out.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what is written.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="How many lines to begin with.")] = 50,
) -> None:
    """Show the end of the logs."""
    settings = Settings.from_environment()
    paths = sorted(settings.logs_dir.glob("*.log"))
    if name is not None:
        paths = [path for path in paths if path.stem == name]
    if not paths:
        known = ", ".join(sorted(path.stem for path in settings.logs_dir.glob("*.log"))) or "none yet"
        raise NotFound(f"there is no log{f' of {name!r}' if name else ''}; there are: {known}")
    arguments = ["tail", f"--lines={lines}", *(["--follow=name", "--retry"] if follow else []), "--", *map(str, paths)]
    os.execvp("tail", arguments)


@app.command()
def export(
    checkpoint: Annotated[str, typer.Argument(help="A Hugging Face checkpoint folder.")],
    out: Annotated[Path, typer.Argument(help="The version folder to write.")],
    precision: Annotated[str, typer.Option(help="Type of weights and cache.")] = "fp32",
    max_model_len: Annotated[int | None, typer.Option(min=1, help="Longest prompt + output in tokens.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is a version folder.")] = False,
) -> None:
    """Export a checkpoint to ONNX and prove it equal to the original."""
    from control_plane.launcher.console import Screen
    from control_plane.subprocesses import run_child

    screen = Screen()
    command = [sys.executable, "-m", "exporters", checkpoint, str(out), "--precision", precision]
    command += [] if max_model_len is None else ["--max-model-len", str(max_model_len)]
    command += ["--overwrite"] if overwrite else []
    with screen.child(f"export {checkpoint}") as on_event:
        finished = run_child(command, on_event)
    if finished is not None:
        screen.console.print(_certificate_table(finished.fields))


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="A served model.")],
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 64,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    top_k: Annotated[int | None, typer.Option(help="0 is off.")] = None,
    top_p: Annotated[float | None, typer.Option(help="1 is off.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same tokens.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Ends the output; may be repeated.")] = None,
    stream: Annotated[bool, typer.Option(help="Print while it is generated.")] = True,
) -> None:
    """Generate text with a served model."""
    from control_plane.triton import GenerateCall, connect

    settings = Settings.from_environment()
    given: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed, "stop": stop}
    sampling = {"max_tokens": max_tokens, **{name: value for name, value in given.items() if value not in (None, [])}}
    triton = connect(settings)
    try:
        call = GenerateCall(model, text=prompt, sampling=sampling, stream=stream)
        for response in triton.generate_stream(call, settings.request_timeout_s):
            for output in response.outputs:
                typer.echo(output.text, nl=False)
        typer.echo()
    finally:
        triton.close()


@keys.command("create")
def create_key(
    name: Annotated[str, typer.Argument(help="Whom or what it is for.")],
    role: Annotated[str, typer.Option(help="viewer, developer, operator or admin.")] = "developer",
) -> None:
    """Make an API key and print it, this once."""
    from control_plane.launcher import database

    settings = Settings.from_environment()
    database.upgrade(settings)
    typer.echo(database.create_key(settings, name, role))


def _certificate_table(finished: dict[str, Any] | Any) -> Any:
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in {**finished, **(finished.get("certificate") or {})}.items():
        if name not in ("event", "certificate") and not isinstance(value, (dict, list)):
            table.add_row(name, str(value))
    return table


def main() -> None:
    try:
        app()
    except ControlPlaneError as error:
        kind = "wrong argument: " if isinstance(error, BadRequest) else ""
        print(f"llmos: {kind}{error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
