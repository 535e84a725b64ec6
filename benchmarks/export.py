"""Measures exported versions beside their peers on one model: ``python benchmarks/export.py``, or ``make bench``.

Prepare each engine's files, compare its greedy tokens with those of transformers, then measure in interleaved rounds,
every engine in a fresh process of the same priority and number of threads, one at a time. An engine that cannot be
measured is named with the reason. Results go to benchmarks/results/export-DATE.{json,md,svg}.
"""

from __future__ import annotations

import argparse
import datetime
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # benchmarks is not installed

from benchmarks import checkpoint as checkpoints  # noqa: E402
from benchmarks import environment, exporting, results  # noqa: E402
from benchmarks.bench import (  # noqa: E402
    BUSY_LOAD,
    CACHE,
    RESULTS,
    Bench,
    Failed,
    Reasons,
    machine,
    rotated,
    seeded_checkpoint,
)
from benchmarks.engines import ENGINES, OURS, REFERENCES  # noqa: E402
from benchmarks.engines.llmos import MAX_MODEL_LEN, export_command  # noqa: E402

MEASURED = {
    device: [name for name, spec in ENGINES.items() if "export" in spec.measured and spec.device == device]
    for device in REFERENCES
}
ROWS = {"cpu": (1, 8, 32), "cuda": (1, 8, 32, 64)}
CONTEXT, PREFILL = 200, 512
NUM_PROMPTS, NUM_NEW_TOKENS = 16, 16
"""Prompts that are decoded together to judge greedy tokens, and tokens of each; one longer prompt follows."""
TIE_LOGIT_GAP = 1e-3
"""Largest gap between two logits that fp32 sums in another order may turn around."""
MAX_MEDIAN_RANK = 0.01
"""Of a low precision's tokens in the original's order, as a fraction of the vocabulary; 0.5 is chance."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    options.rounds = options.rounds or (1 if options.quick else 3)
    options.rows = sorted(options.rows or ((1, 8) if options.quick else ROWS[options.device]))
    options.engines = options.engines or MEASURED[options.device]
    # A pipe has no width of its own, and a wrapped table cannot be read.
    console = Console(width=None if sys.stdout.isatty() else 200)
    checkpoint = options.checkpoint or seeded_checkpoint()
    bench = Bench(checkpoint, options.threads, console)
    document: results.Document = {
        "format": results.FORMAT,
        "date": datetime.date.today().isoformat(),
        "machine": machine(options.device),
        "model": checkpoints.describe(checkpoint),
        "settings": {
            "device": options.device,
            "rounds": options.rounds,
            "rows": options.rows,
            "context": CONTEXT,
            "prefill": PREFILL,
            "num_threads": options.threads,
            "warmup_steps": 8,
            "steps": 8 if options.quick else 24,
            "prefills": 1 if options.quick else 3,
            "quick": options.quick,
        },
        "engines": {},
        "absent": {},
    }
    if (load := document["machine"]["load_before"]) > BUSY_LOAD:
        bench.say(f"[yellow]the load is {load:.1f}: something else is running, and the times will be too long[/yellow]")
    if options.memory:
        document["exports"], document["absent"] = measure_exports(bench, options.precisions)
    else:
        try:
            measure_engines(bench, options.engines, document)
        except (Failed, environment.InstallFailed) as error:
            console.print(f"Nothing could be measured: {error}", markup=False, soft_wrap=True)
            return 1
    show(console, document)
    kind = "memory" if options.memory else "export" if options.device == "cpu" else f"export-{options.device}"
    name = f"{kind}-{document['date']}{'-quick' if options.quick else ''}"
    written = [str(path) for path in results.write(document, options.out, name)]
    if document["engines"] and environment.PYTHON.exists():
        plot = options.out / f"{name}.svg"
        script = ROOT / "benchmarks" / "plot.py"
        subprocess.run([str(environment.PYTHON), str(script), written[0], str(plot)], check=True)
        written.append(str(plot))
    console.print("Written: " + ", ".join(written), highlight=False, soft_wrap=True)
    return 0 if document["engines"] or document.get("exports") else 1


def measure_engines(bench: Bench, names: Sequence[str], document: results.Document) -> None:
    """Prepare, judge, measure; fills in ``engines`` and ``absent``. Raises Failed if the original cannot judge."""
    absent: Reasons = document["absent"]
    settings, vocab_size = document["settings"], document["model"]["vocab_size"]
    packages = environment.ensure() if any(ENGINES[name].peer for name in names) else {}
    absent |= {name: packages[p] for name in names if (p := ENGINES[name].packages[0]) in packages}
    limits = {
        "num_threads": settings["num_threads"],
        "max_rows": max(settings["rows"]),
        "max_tokens": max(PREFILL, CONTEXT + settings["steps"]) + NUM_NEW_TOKENS,
    }
    reference = REFERENCES[settings["device"]]
    present = [name for name in names if name not in absent]
    engines = judge_engines(bench, present, reference, limits, vocab_size, absent)
    samples: dict[str, list[dict[str, Any]]] = {name: [] for name in engines}
    task = {"do": "time", "limits": limits, "vocab_size": vocab_size, **settings}
    for number in range(settings["rounds"]):
        for name in rotated(list(samples), number):
            bench.say(f"round {number + 1} of {settings['rounds']}: {name}")
            with bench.leaving_out(name, absent):
                samples[name].append(bench.work(name, **task))
        samples = {name: found for name, found in samples.items() if name not in absent}
    for name, found in samples.items():
        document["engines"][name] = engines[name] | results.summarise(found, PREFILL)
    results.add_ratios(document["engines"], OURS)


def judge_engines(
    bench: Bench, names: Sequence[str], reference: str, limits: dict[str, int], vocab_size: int, absent: Reasons
) -> dict[str, dict[str, Any]]:
    """Prepare each engine and let it write; returns those whose tokens are right, described for the result."""
    limits = limits | {"max_rows": NUM_PROMPTS}
    together = checkpoints.random_prompts(vocab_size, NUM_PROMPTS, 24)
    alone = checkpoints.random_prompts(vocab_size, 1, 97)
    answers: dict[str, dict[str, Any]] = {}
    for name in names:
        with bench.leaving_out(name, absent):
            bench.prepare(name)
            answers[name] = bench.work(
                name, do="tokens", limits=limits, batches=[together, alone], num_new=NUM_NEW_TOKENS
            )
    texts = {name: answer["tokens"] for name, answer in answers.items()}
    engines: dict[str, dict[str, Any]] = {}
    for name, judged in bench.judge([*together, *alone], texts, limits, reference).items():
        with bench.leaving_out(name, absent):
            engines[name] = described(name, answers[name], results.agreement(judged), vocab_size)
            bench.say(f"{name}: {engines[name]['agreement']}")
    return engines


def described(name: str, answer: dict[str, Any], agreement: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    """The engine's part of the result before it is measured; raises Failed if its tokens are wrong."""
    spec = ENGINES[name]
    if spec.precision == "fp32" and agreement["max_logit_gap"] > TIE_LOGIT_GAP:
        raise Failed(f"in fp32 its greedy tokens are not those of transformers: {agreement}")
    if agreement["median_rank"] > MAX_MEDIAN_RANK * vocab_size:
        raise Failed(f"its greedy tokens have little to do with those of transformers: {agreement}")
    return {
        "label": spec.label,
        "precision": spec.precision,
        "versions": answer["versions"],
        "agreement": agreement,
    }


def measure_exports(bench: Bench, precisions: Sequence[str]) -> tuple[dict[str, Any], Reasons]:
    """Cost of exporting the checkpoint in each precision; refused precisions with the reason."""
    found, refused = {}, {}
    weights = checkpoints.size_bytes(bench.checkpoint)
    for precision in precisions:
        bench.say(f"exporting {precision}")
        out = CACHE / "measured-export"
        shutil.rmtree(out, ignore_errors=True)
        command = export_command(bench.checkpoint, out, precision)
        try:
            found[precision] = exporting.measure(command, bench.environment(), weights)
        except exporting.ExportRefused as reason:
            bench.say(f"[yellow]{precision} is left out:[/yellow] {reason}")
            refused[f"{OURS}-{precision}"] = f"export refused: {reason}"
        shutil.rmtree(out, ignore_errors=True)
    return found, refused


def show(console: Console, document: results.Document) -> None:
    tables = {"Beside peers": results.table(document)} if document["engines"] else {}
    if document.get("exports"):
        tables["Exporting"] = results.export_table(document)
    for title, (titles, lines) in tables.items():
        table = Table(title=title)
        for index, column in enumerate(titles):
            table.add_column(column, justify="left" if index < 2 else "right", no_wrap=True)
        for line in lines:
            table.add_row(*line)
        console.print(table)
    for name, why in document["absent"].items():
        console.print(f"{name} was not measured: {why}", highlight=False, markup=False, soft_wrap=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Measure exported versions beside their peers.")
    every = [name for names in MEASURED.values() for name in names]
    parser.add_argument("--device", choices=MEASURED, default="cpu", help="cuda: our engine beside PyTorch on a GPU")
    parser.add_argument("--engines", nargs="+", choices=every, metavar="NAME", help="default: all of the device")
    parser.add_argument("--rounds", type=int, help="interleaved rounds (default: 3, with --quick 1)")
    parser.add_argument("--rows", type=int, nargs="+", help="rows of a decode step (default: 1 8 32, on a GPU also 64)")
    parser.add_argument("--threads", type=int, default=psutil.cpu_count(logical=False) or 1, help="threads per engine")
    parser.add_argument("--checkpoint", type=Path, help="measure this Llama checkpoint instead of the seeded one")
    parser.add_argument("--quick", action="store_true", help="one short round of 1 and 8 rows, to see that it works")
    parser.add_argument("--memory", action="store_true", help="measure time and memory of exporting instead")
    parser.add_argument("--precisions", nargs="+", default=["fp32", "int8", "int4"], help="what --memory exports")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.epilog = f"NAME is one of: {', '.join(every)}. Exports hold up to {MAX_MODEL_LEN} tokens per row."
    return parser


if __name__ == "__main__":
    sys.exit(main())
