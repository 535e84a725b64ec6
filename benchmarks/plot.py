"""``python plot.py RESULT.json OUT.svg``: draws a result of benchmarks.export or of serving; needs matplotlib only.

Both are panels of bars, one bar per engine: a panel per number of rows, or a column of panels per number of clients.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COLOURS = {"fp32": "#4477aa", "fp16": "#aa3377", "int8": "#ee6677", "int4": "#228833"}


@dataclass(frozen=True)
class Panel:
    """``values`` and how far down and up from each its line goes, one per engine; ``axis`` names their unit."""

    title: str
    axis: str
    values: Sequence[float]
    below: Sequence[float]
    above: Sequence[float]
    number_format: str = "%.0f"


def step_panels(document: dict[str, Any]) -> list[list[Panel]]:
    """One row: decode steps by number of rows, then prefill; lines from the fastest to the slowest round."""
    engines = list(document["engines"].values())
    rows = [str(n) for n in document["settings"]["rows"]]
    found = {f"decode step, {n} row{'s' * (n != '1')}": [engine["decode"][n] for engine in engines] for n in rows}
    found[f"prefill, {document['settings']['prefill']} tokens"] = [engine["prefill"] for engine in engines]
    return [[
        Panel(
            title,
            "ms, less is better",
            [one["median_ms"] for one in values],
            [one["median_ms"] - one["min_ms"] for one in values],
            [one["max_ms"] - one["median_ms"] for one in values],
        )
        for title, values in found.items()
    ]]  # fmt: skip


def serving_panels(document: dict[str, Any]) -> list[list[Panel]]:
    """Rows: throughput with its slowest and fastest round, then TTFT and ITL, p50 with a line to p95."""
    clients = [str(n) for n in document["settings"]["clients"]]
    found = {n: [engine["clients"][n] for engine in document["engines"].values()] for n in clients}
    titles = {n: f"{n} client{'s' * (n != '1')}" for n in clients}
    panels = [[
        Panel(
            titles[n],
            "output tokens/s, more is better",
            [one["tokens_per_s"] for one in found[n]],
            [one["tokens_per_s"] - min(one["rounds_tokens_per_s"]) for one in found[n]],
            [max(one["rounds_tokens_per_s"]) - one["tokens_per_s"] for one in found[n]],
            "%.3g",
        )
        for n in clients
    ]]  # fmt: skip
    for title, kind in (("TTFT ms", "ttft_ms"), ("ITL ms", "itl_ms")):
        panels.append([
            Panel(
                titles[n],
                f"{title}, p50; line to p95",
                [one[kind]["p50"] for one in found[n]],
                [0.0] * len(found[n]),
                [one[kind]["p95"] - one[kind]["p50"] for one in found[n]],
                "%.3g",
            )
            for n in clients
        ])  # fmt: skip
    return panels


def draw(document: dict[str, Any], out: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    engines = list(document["engines"].values())
    names = [f"{engine['label']} {engine['precision']}" for engine in engines]
    colours = [COLOURS[engine["precision"]] for engine in engines]
    panels = serving_panels(document) if "scenario" in document else step_panels(document)
    size = (4 * len(panels[0]) + 1, 1.2 + len(panels) * (0.6 + 0.27 * len(names)))
    figure, axes = pyplot.subplots(len(panels), len(panels[0]), figsize=size, sharey=True, squeeze=False)
    for axis, panel in zip(axes.flat, (panel for row in panels for panel in row), strict=True):
        lines = {"xerr": [panel.below, panel.above], "error_kw": {"ecolor": "#555555", "lw": 1}}
        bars = axis.barh(names, panel.values, color=colours, **lines)
        axis.bar_label(bars, fmt=panel.number_format, padding=4, fontsize=8)
        axis.margins(x=0.18)
        axis.set_title(panel.title, fontsize=10)
        axis.set_xlabel(panel.axis, fontsize=8)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].invert_yaxis()
    used = [precision for precision in COLOURS if any(engine["precision"] == precision for engine in engines)]
    figure.legend([Patch(color=COLOURS[p]) for p in used], used, loc="lower left", ncols=len(used), fontsize=8)
    figure.suptitle(f"{document['model']['name']} on {document['machine']['cpu']}, {document['date']}", fontsize=11)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(out)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
