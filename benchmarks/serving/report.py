"""Results for people: tables, as Markdown and on the terminal, and the files that a run leaves.

A document is {"format", "kind", "date", "machine", "model", "settings", "tables", "notes", "absent", …the numbers…};
``tables`` is what people see: [{"title", "columns", "lines", "text"}], made here or by a scenario.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.results import save
from benchmarks.serving.targets import reached

FORMAT = 1
Document = dict[str, Any]
TEXT_COLUMNS = ("engine", "weights", "served by", "what", "beside", "kind", "part", "model")


def table(title: str, columns: Sequence[str], lines: Iterable[Sequence[Any]], text: str = "") -> dict[str, Any]:
    return {"title": title, "columns": list(columns), "lines": [[*map(cell, line)] for line in lines], "text": text}


def cell(value: Any) -> str:
    """Numbers with the digits that mean something; what was not measured is a dash."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)


def load_tables(engines: Mapping[str, Mapping[str, Any]], clients: Sequence[str]) -> list[dict[str, Any]]:
    """Throughput with ratios, latencies per number of clients, targets."""
    return [
        _throughput(engines, clients),
        *(_latency(engines, n) for n in clients),
        table(
            "Targets",
            ["what", "clients", "tokens/s", "beside", "tokens/s of it", "ratio", "wanted", "met"],
            [
                [each[name] for name in ("title", "clients", "ours", "other", "theirs", "ratio", "wanted", "is_met")]
                for each in reached(engines)
            ],
            "Ratio: llmos's tokens a second divided by the other's.",
        ),
    ]


def _throughput(engines: Mapping[str, Mapping[str, Any]], clients: Sequence[str]) -> dict[str, Any]:
    columns = ["engine", "weights", "served by"]
    for n in clients:
        columns += [f"{n} client{'s' * (n != '1')} tokens/s", "ratio"]
    columns += ["equal answers", "equal tokens", "RSS MiB"]
    lines = []
    for engine in engines.values():
        line = [engine["label"], engine["precision"], engine["served_by"]]
        for n in clients:
            line += [engine["clients"][n]["tokens_per_s"], engine["clients"][n]["ratio"]]
        same = engine["agreement"]
        line += [f"{same['equal_answers']}/{same['answers']}", f"{same['equal_tokens']}/{same['tokens']}"]
        lines.append([*line, round(engine["peak_rss_bytes"] / 2**20)])
    text = (
        "Ratio: tokens a second divided by those of llmos in fp32 for engines in fp32, by those of llmos in int8 for "
        "the others; below 1 is slower than llmos. Equal: to llmos in fp32, tokens up to the first difference."
    )
    return table("Throughput", columns, lines, text)


def _latency(engines: Mapping[str, Mapping[str, Any]], n: str) -> dict[str, Any]:
    columns = ["engine", "weights", "TTFT p50 ms", "TTFT p95 ms", "ITL p50 ms", "ITL p95 ms", "tokens/s of the rounds"]
    lines = []
    for engine in engines.values():
        found = engine["clients"][n]
        rounds = [cell(float(value)) for value in found["rounds_tokens_per_s"]]
        spreads = [found[kind][percent] for kind in ("ttft_ms", "itl_ms") for percent in ("p50", "p95")]
        lines.append([engine["label"], engine["precision"], *spreads, " ".join(rounds)])
    return table(f"Latency, {n} client{'s' * (n != '1')}", columns, lines)


def markdown(document: Document) -> str:
    parts = [f"# {document['kind']}, {document['date']}", *document["notes"]]
    for each in document["tables"]:
        parts += [f"## {each['title']}", *filter(None, [each["text"]]), _markdown_table(each)]
    if document["absent"]:
        parts += ["## Not measured", _list(f"**{name}**: {why}" for name, why in document["absent"].items())]
    facts = {**document["machine"], **{f"model {k}": v for k, v in document["model"].items()}, **document["settings"]}
    parts += ["## Machine, model and settings", _list(f"{name}: {value}" for name, value in facts.items())]
    if document.get("versions"):
        parts += ["## Versions", _list(f"{name} {version}" for name, version in sorted(document["versions"].items()))]
    return "\n\n".join(parts) + "\n"


def write(document: Document, folder: Path, name: str) -> tuple[Path, Path]:
    return save(document, markdown(document), folder, name)


def show(console: Console, document: Document) -> None:
    for each in document["tables"]:
        shown = Table(title=each["title"], caption=each["text"] or None)
        for column in each["columns"]:
            shown.add_column(column, justify="left" if column in TEXT_COLUMNS else "right")
        for line in each["lines"]:
            shown.add_row(*line)
        console.print(shown)
    for name, why in document["absent"].items():
        console.print(f"{name} was not measured: {why}", highlight=False, markup=False, soft_wrap=True)


def _markdown_table(each: Mapping[str, Any]) -> str:
    rows = [each["columns"], ["---"] * len(each["columns"]), *each["lines"]]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _list(items: Iterable[str]) -> str:
    return "\n".join(f"- {item}" for item in items)
