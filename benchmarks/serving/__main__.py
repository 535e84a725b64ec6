"""``python -m benchmarks.serving``: how fast requests are answered, beside peers; with ``--scenario``, something else.

Results go to benchmarks/results/serving-DATE.{json,md,svg}, those of a scenario to serving-SCENARIO-DATE.{json,md}.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from benchmarks import checkpoint as checkpoints
from benchmarks import environment
from benchmarks.bench import BUSY_LOAD, RESULTS, ROOT, Bench, Failed, machine, seeded_checkpoint
from benchmarks.engines import ENGINES
from benchmarks.serving import report
from benchmarks.serving.run import Options, Run

SCENARIOS = {
    "clients": "1, 8 and 32 clients at once, beside peers",
    "long-prompt": "a prompt of 2,000 tokens arrives beside 8 running streams",
    "soak": "1,000 mixed requests through 32 rows, every answer checked",
    "step": "time of an engine step outside the graph, 32 rows, vocabulary of 152 k",
    "beams": "beam search of width 4, decoder and encoder–decoder, beside peers",
}
SERVED = [name for name, spec in ENGINES.items() if "serving" in spec.measured]


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # whoever is told to stop keeps what was measured
    # A pipe has no width of its own, and a wrapped table cannot be read.
    console = Console(width=None if sys.stdout.isatty() else 220)
    checkpoint = parsed.checkpoint or seeded_checkpoint()
    bench = Bench(checkpoint, parsed.threads, console)
    facts = machine()
    if facts["load_before"] > BUSY_LOAD:
        bench.say(f"[yellow]the load is {facts['load_before']}: something else is running here[/yellow]")
    with tempfile.TemporaryDirectory(prefix="llmos-serving-") as home:
        run = Run(bench, _options(parsed), Path(home))
        try:
            found = measure(run, parsed.scenario)
        except (Failed, environment.InstallFailed) as error:
            console.print(f"Nothing could be measured: {error}", markup=False, soft_wrap=True)
            return 1
    document = {
        "format": report.FORMAT,
        "scenario": parsed.scenario,
        "date": datetime.date.today().isoformat(),
        "machine": facts,
        "model": checkpoints.describe(checkpoint),
        "settings": asdict(run.options),
        "versions": run.versions,
        "absent": run.absent,
        **found,
    }
    report.show(console, document)
    written = _write(document, parsed.out)
    console.print("Written: " + ", ".join(map(str, written)), highlight=False, soft_wrap=True)
    return 0 if document["tables"] else 1


def measure(run: Run, scenario: str) -> dict[str, Any]:
    """Run a scenario's module; its result is {"kind", "tables", "notes", …numbers…}. Raises Failed."""
    module = importlib.import_module(f"benchmarks.serving.{scenario.replace('-', '_')}")
    return {"kind": module.KIND, **module.measure(run)}


def _write(document: dict[str, Any], folder: Path) -> list[Path]:
    parts = ["serving", *([document["scenario"]] if document["scenario"] != "clients" else []), document["date"]]
    name = "-".join([*parts, *(["quick"] if document["settings"]["quick"] else [])])
    written = list(report.write(document, folder, name))
    if document.get("engines") and environment.PYTHON.exists():
        plot = folder / f"{name}.svg"
        script = ROOT / "benchmarks" / "plot.py"
        subprocess.run([str(environment.PYTHON), str(script), str(written[0]), str(plot)], check=True)
        written.append(plot)
    return written


def _options(parsed: argparse.Namespace) -> Options:
    quick = parsed.quick
    return Options(
        engines=tuple(parsed.engines),
        clients=tuple(sorted(parsed.clients or ((1, 4) if quick else (1, 8, 32)))),
        rounds=parsed.rounds or (1 if quick else 3),
        waves=parsed.waves or (1 if quick else 2),
        num_new=parsed.tokens or (16 if quick else 64),
        num_threads=parsed.threads,
        precision=parsed.precision,
        num_requests=parsed.requests or (60 if quick else 1000),
        quick=quick,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description="Measure serving.")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--scenario", choices=SCENARIOS, default="clients")
    parser.add_argument("--engines", nargs="+", choices=SERVED, default=SERVED, metavar="NAME", help="who is measured")
    parser.add_argument("--clients", type=int, nargs="+", help="clients at once (default: 1 8 32)")
    parser.add_argument("--rounds", type=int, help="interleaved rounds (default: 3)")
    parser.add_argument("--waves", type=int, help="requests that each client sends (default: 2)")
    parser.add_argument("--tokens", type=int, help="tokens of each answer (default: 64)")
    parser.add_argument("--threads", type=int, default=psutil.cpu_count(logical=False) or 1, help="threads per engine")
    parser.add_argument("--precision", choices=("fp32", "int8"), default="fp32", help="long-prompt, soak: of llmos")
    parser.add_argument("--requests", type=int, help="soak: how many (default: 1000)")
    parser.add_argument("--checkpoint", type=Path, help="measure this Llama checkpoint instead of the seeded one")
    parser.add_argument("--quick", action="store_true", help="one short round, to see that it works")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    scenarios = "\n".join(f"  {name:12} {what}" for name, what in SCENARIOS.items())
    parser.epilog = f"scenarios:\n{scenarios}\n\nNAME is one of: {', '.join(SERVED)}."
    return parser


if __name__ == "__main__":
    sys.exit(main())
