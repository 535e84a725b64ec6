"""What a run found out, as numbers and as tables; knows nothing of engines and needs only the standard library.

Samples of single processes become medians over rounds (``summarise``), medians become ratios to llmos within the same
precision (``add_ratios``), and the document that holds both is written as JSON and Markdown. A result:

    {"format": 1, "date": …, "machine": {…}, "model": {…}, "settings": {…},
     "engines": {"llmos-fp32": {"label", "precision", "versions", "agreement", "peak_rss_bytes",
                                "decode": {"1": {"median_ms", "min_ms", "max_ms", "rounds_ms", "tokens_per_s",
                                                 "ratio"}},
                                "prefill": {…the same…}}},
     "absent": {"genai-int4": reason},
     "exports": {"fp32": {…what benchmarks/exporting.py measured…}}}
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

FORMAT = 1
PROOF = "certify"
"""The step of an export that compares, and whose time depends on the number of prompts."""
Document = dict[str, Any]


def spread(rounds_ms: Sequence[float], tokens_per_run: int) -> dict[str, Any]:
    """Median and range of one number over the rounds, and how many tokens a second the median makes."""
    median_ms = statistics.median(rounds_ms)
    return {
        "median_ms": median_ms,
        "min_ms": min(rounds_ms),
        "max_ms": max(rounds_ms),
        "rounds_ms": list(rounds_ms),
        "tokens_per_s": 1e3 * tokens_per_run / median_ms,
    }


def summarise(samples: Sequence[Mapping[str, Any]], num_prefill_tokens: int) -> dict[str, Any]:
    """One engine's samples, one per round as a worker returned them, as medians."""
    rows = list(samples[0]["decode_ms"])
    return {
        "decode": {n: spread([sample["decode_ms"][n] for sample in samples], int(n)) for n in rows},
        "prefill": spread([sample["prefill_ms"] for sample in samples], num_prefill_tokens),
        "peak_rss_bytes": max(sample["peak_rss_bytes"] for sample in samples),
    }


def agreement(judged: Sequence[tuple[int, float]]) -> dict[str, Any]:
    """What the original thinks of an engine's greedy tokens, each after the same text: (rank, logit gap) of each.

    ``equal_tokens`` are its own choice too. Random weights leave little between the largest logits, so low precisions
    often choose another token, but one that is near the top; what is computed wrongly ranks anywhere.
    """
    return {
        "tokens": len(judged),
        "equal_tokens": sum(rank == 0 for rank, _ in judged),
        "median_rank": statistics.median(rank for rank, _ in judged),
        "max_logit_gap": max(gap for _, gap in judged),
    }


def add_ratios(engines: Mapping[str, dict[str, Any]], ours: str) -> None:
    """Give each number its ``ratio``: time divided by that of ``ours`` in the same precision; 2.0 takes twice as long.

    None where ours was not measured in that precision.
    """
    baselines = {engine["precision"]: engine for engine in engines.values() if engine["label"] == ours}
    for engine in engines.values():
        baseline = baselines.get(engine["precision"])
        for n, found in engine["decode"].items():
            found["ratio"] = found["median_ms"] / baseline["decode"][n]["median_ms"] if baseline else None
        prefill = engine["prefill"]
        prefill["ratio"] = prefill["median_ms"] / baseline["prefill"]["median_ms"] if baseline else None


def table(document: Document) -> tuple[list[str], list[list[str]]]:
    """Column titles and one row of texts per engine, in the order of the document."""
    rows_measured = document["settings"]["rows"]
    titles = ["engine", "weights"]
    for n in rows_measured:
        titles += [f"n={n} ms", "tokens/s", "ratio"]
    titles += [f"prefill {document['settings']['prefill']} ms", "tokens/s", "ratio", "equal tokens", "RSS MiB"]
    lines = []
    for engine in document["engines"].values():
        line = [engine["label"], engine["precision"]]
        for n in rows_measured:
            line += _cells(engine["decode"][str(n)])
        line += _cells(engine["prefill"])
        same = engine["agreement"]
        line += [f"{same['equal_tokens']}/{same['tokens']}", f"{engine['peak_rss_bytes'] / 2**20:.0f}"]
        lines.append(line)
    return titles, lines


def export_table(document: Document) -> tuple[list[str], list[list[str]]]:
    """Steps of each export, then the whole with and without its proof; one line each."""
    titles = ["export", "step", "seconds", "peak RSS MiB", "× checkpoint"]
    lines = []
    for precision, export in document.get("exports", {}).items():
        unproven = [step for step in export["steps"] if step["step"] != PROOF]
        parts = [
            *export["steps"],
            {
                "step": f"all but {PROOF}",
                "seconds": sum(step["seconds"] for step in unproven),
                "peak_rss_bytes": max(step["peak_rss_bytes"] for step in unproven),
            },
            {**export, "step": f"all; certificate {'passed' if export['passed'] else 'failed'}"},
        ]
        for part in parts:
            peak = part["peak_rss_bytes"]
            memory = [f"{peak / 2**20:.0f}", f"{peak / export['checkpoint_bytes']:.2f}"] if peak else ["–", "–"]
            lines.append([precision, part["step"], f"{part['seconds']:.1f}", *memory])
    return titles, lines


def markdown(document: Document) -> str:
    """The whole result for people: tables, machine, model, versions, and who is absent and why."""
    machine, model, settings = document["machine"], document["model"], document["settings"]
    parts = [f"# Exported models beside their peers, {document['date']}"]
    if document["engines"]:
        parts.append(
            f"Medians of {settings['rounds']} interleaved round(s), every engine in a process of its own, threads: "
            f"{settings['num_threads']}. A decode step starts at context {settings['context']} and ends with the "
            f"greedy token of each of n rows; prefill is the time to the first token after {settings['prefill']} "
            "prompt tokens. Ratio: time divided by llmos's with weights of the same precision; above 1 is slower "
            "than llmos. Equal tokens: greedy tokens that transformers would choose too after the same text."
        )
        parts.append(_markdown_table(*table(document)))
        parts += ["Fastest and slowest round, ms:", _markdown_table(*_range_table(document))]
    if document.get("exports"):
        parts += ["## Exporting", _markdown_table(*export_table(document))]
    if document["absent"]:
        parts += ["## Not measured", _list(f"**{name}**: {why}" for name, why in document["absent"].items())]
    facts = {**machine, **{f"model {name}": value for name, value in model.items()}}
    parts += ["## Machine and model", _list(f"{name}: {value}" for name, value in facts.items())]
    if document["engines"]:
        versions = {f"{n} {v}" for engine in document["engines"].values() for n, v in engine["versions"].items()}
        parts += ["## Versions", _list(sorted(versions))]
    return "\n\n".join(parts) + "\n"


def write(document: Document, folder: Path, name: str) -> tuple[Path, Path]:
    return save(document, markdown(document), folder, name)


def save(document: Document, text: str, folder: Path, name: str) -> tuple[Path, Path]:
    """Write ``name``.json and, as ``text`` tells it, ``name``.md; an earlier result of that name is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    json_path, markdown_path = folder / f"{name}.json", folder / f"{name}.md"
    json_path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    markdown_path.write_text(text, encoding="utf-8")
    return json_path, markdown_path


def _range_table(document: Document) -> tuple[list[str], list[list[str]]]:
    rows = [str(n) for n in document["settings"]["rows"]]
    lines = []
    for name, engine in document["engines"].items():
        found = [engine["decode"][n] for n in rows] + [engine["prefill"]]
        lines.append([name, *(f"{value['min_ms']:.1f}–{value['max_ms']:.1f}" for value in found)])
    return ["engine", *(f"n={n}" for n in rows), "prefill"], lines


def _cells(found: Mapping[str, Any]) -> list[str]:
    ratio = "–" if found["ratio"] is None else f"{found['ratio']:.2f}"
    return [f"{found['median_ms']:.1f}", f"{found['tokens_per_s']:.0f}", ratio]


def _list(items: Iterable[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


def _markdown_table(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [titles, ["---"] * len(titles), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
