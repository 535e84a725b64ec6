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

from control_plane.commands.adapters import adapters
from control_plane.commands.api import connected
from control_plane.commands.audit import audit
from control_plane.commands.deployments import abort, canary, promote, retire, rollback, withdraw
from control_plane.commands.jobs import jobs
from control_plane.commands.keys import keys
from control_plane.commands.models import evaluate, import_checkpoint, models, publish
from control_plane.commands.storage import artifacts, gc
from control_plane.commands.system import system
from control_plane.commands.users import users
from control_plane.errors import BadRequest, ControlPlaneError, NotFound
from control_plane.settings import Settings

app = typer.Typer(help="An LLM operating system for one machine.", no_args_is_help=True, pretty_exceptions_enable=False)
app.add_typer(keys, name="keys")
app.add_typer(users, name="users")
app.add_typer(jobs, name="jobs")
app.add_typer(models, name="models")
app.add_typer(adapters, name="adapters")
app.command("import")(import_checkpoint)
for command in (publish, evaluate, promote, rollback, canary, abort, withdraw, retire, artifacts, gc, system, audit):
    app.command()(command)


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
    from control_plane.registry import serving_state
    from control_plane.supervision import SupervisorClient

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
    checkpoint: Annotated[str, typer.Argument(help="A Hugging Face checkpoint folder, or the id of a Hub model.")],
    out: Annotated[Path, typer.Argument(help="The version folder to write.")],
    precision: Annotated[str, typer.Option(help="fp32, fp16, bf16, int8 or int4.")] = "fp32",
    device: Annotated[str, typer.Option(help="Where it will run: cpu or cuda.")] = "cpu",
    name: Annotated[str | None, typer.Option(help="What the model is called.")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Longest prompt + output in tokens.")] = None,
    max_num_seqs: Annotated[int | None, typer.Option(help="Sequences that can run at once.")] = None,
    max_source_len: Annotated[int | None, typer.Option(help="Encoder–decoder: longest source in tokens.")] = None,
    block_size: Annotated[int | None, typer.Option(help="int4: weights that share a scale.")] = None,
    accuracy_level: Annotated[int | None, typer.Option(help="int4: 0 computes in fp32, 4 in int8.")] = None,
    calibration: Annotated[Path | None, typer.Option(help="int8: text that shows outlying activations.")] = None,
    lora_slots: Annotated[int | None, typer.Option(help="Adapters that can be loaded at once.")] = None,
    lora_rank: Annotated[int | None, typer.Option(help="Largest rank of an adapter.")] = None,
    lora_targets: Annotated[str | None, typer.Option(help="Modules that adapters may change: a,b,….")] = None,
    engine: Annotated[list[str] | None, typer.Option(help="NAME=VALUE of its engine; may repeat.")] = None,
    threshold: Annotated[list[str] | None, typer.Option(help="NAME=VALUE of the certificate; may repeat.")] = None,
    eval_text: Annotated[Path | None, typer.Option(help="Text to compare both models on.")] = None,
    certify: Annotated[bool, typer.Option(help="Prove it; without, the version has no certificate.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be made, and write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is a version folder.")] = False,
) -> None:
    """Export a checkpoint to ONNX and prove it equal to the original; exit code 3 if the proof fails."""
    from control_plane.launcher import proof_report

    given = {
        "--precision": precision,
        "--device": device,
        "--name": name,
        "--max-model-len": max_model_len,
        "--max-num-seqs": max_num_seqs,
        "--max-source-len": max_source_len,
        "--block-size": block_size,
        "--accuracy-level": accuracy_level,
        "--calibration": calibration,
        "--lora-slots": lora_slots,
        "--lora-rank": lora_rank,
        "--lora-targets": lora_targets,
        "--eval-text": eval_text,
    }
    flags = {"--no-certify": not certify, "--dry-run": dry_run, "--overwrite": overwrite}
    # Values are joined to their options: one that begins with a dash is not taken for another option.
    command = ["exporters", *(f"{option}={value}" for option, value in given.items() if value is not None)]
    command += [f"--engine={text}" for text in engine or ()]
    command += [f"--threshold={text}" for text in threshold or ()]
    command += [flag for flag, is_set in flags.items() if is_set]
    finished = _run_exporter([*command, "--", checkpoint, str(out)], f"{'plan' if dry_run else 'export'} {checkpoint}")
    if dry_run:
        _show(proof_report.plan_table(finished["plan"]))
        return
    _show(proof_report.export_table(finished), "", f"Run the proof again anywhere: llmos verify {out}")
    raise typer.Exit(3 if finished["passed"] is False else 0)


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="A version folder.")],
    checkpoint: Annotated[str | None, typer.Option(help="The original, if it is not where it was.")] = None,
    threshold: Annotated[list[str] | None, typer.Option(help="NAME=VALUE of the certificate; may repeat.")] = None,
    eval_text: Annotated[Path | None, typer.Option(help="The text that was given to the export, if any.")] = None,
) -> None:
    """Run a version's proof again: exit code 0 if it is equal, 1 if that cannot be found out, 3 if it is not."""
    from control_plane.launcher import proof_report

    command = ["exporters.verify", *(f"--threshold={text}" for text in threshold or ())]
    command += [] if checkpoint is None else [f"--checkpoint={checkpoint}"]
    command += [] if eval_text is None else [f"--eval-text={eval_text}"]
    finished = _run_exporter([*command, "--", str(folder)], f"verify {folder}")
    _show(proof_report.verification_table(finished))
    raise typer.Exit(0 if finished["passed"] else 3)


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="A served model, MODEL@ALIAS or MODEL@VERSION.")],
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
    given: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed, "stop": stop}
    params = {"max_tokens": max_tokens, **{name: value for name, value in given.items() if value not in (None, [])}}
    with connected() as llmos:
        for text in llmos.complete(model, prompt, stream=stream, **params):
            typer.echo(text, nl=False)
    typer.echo()


def _run_exporter(arguments: list[str], title: str) -> dict[str, Any]:
    """Run ``python -m ARGUMENTS`` and return its last event; a proof that failed (exit code 3) has one as well."""
    from control_plane.launcher.console import Screen
    from control_plane.subprocesses import ChildFailed, run_child

    with Screen().child(title) as on_event:
        finished = run_child([sys.executable, "-m", *arguments], on_event, good_statuses=(0, 3))
    if finished is None:
        raise ChildFailed(f"{title} ended without saying what it found")
    return dict(finished.fields)


def _show(*parts: Any) -> None:
    from control_plane.launcher.console import Screen

    screen = Screen()
    for part in parts:
        screen.console.print(part, markup=False)


def main() -> None:
    try:
        app()
    except ControlPlaneError as error:
        kind = "wrong argument: " if isinstance(error, BadRequest) else ""
        print(f"llmos: {kind}{error}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        print(f"llmos: {error.strerror or error}: {error.filename or 'see above'}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
