"""``python plot.py RESULT.json OUT.svg``: a column per number of clients; throughput, TTFT and ITL of every engine."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

COLOURS = {"fp32": "#4477aa", "int8": "#ee6677", "int4": "#228833"}


def draw(document: dict[str, Any], out: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    engines = list(document["engines"].values())
    clients = [str(n) for n in document["settings"]["clients"]]
    names = [f"{engine['label']} {engine['precision']}" for engine in engines]
    colours = [COLOURS[engine["precision"]] for engine in engines]
    rows = (("output tokens/s, more is better", None), ("TTFT ms", "ttft_ms"), ("ITL ms", "itl_ms"))
    size = (4 * len(clients) + 1, len(rows) * (0.9 + 0.24 * len(names)))
    figure, axes = pyplot.subplots(len(rows), len(clients), figsize=size, sharey=True, squeeze=False)
    for line, (title, kind) in zip(axes, rows, strict=True):
        for axis, n in zip(line, clients, strict=True):
            found = [engine["clients"][n] for engine in engines]
            if kind is None:
                values, errors = [each["tokens_per_s"] for each in found], _ranges(found)
            else:
                values = [each[kind]["p50"] for each in found]
                errors = [[0.0] * len(found), [each[kind]["p95"] - each[kind]["p50"] for each in found]]
            bars = axis.barh(names, values, xerr=errors, color=colours, error_kw={"ecolor": "#555555", "lw": 1})
            axis.bar_label(bars, fmt="%.3g", padding=4, fontsize=8)
            axis.margins(x=0.18)
            axis.set_title(f"{n} client{'s' * (n != '1')}", fontsize=10)
            axis.set_xlabel(title if kind is None else f"{title}, p50; line to p95", fontsize=8)
            axis.tick_params(labelsize=8)
            axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].invert_yaxis()
    used = [p for p in COLOURS if any(engine["precision"] == p for engine in engines)]
    figure.legend([Patch(color=COLOURS[p]) for p in used], used, loc="lower left", ncols=len(used), fontsize=8)
    title = f"Serving {document['model']['name']} on {document['machine']['cpu']}, {document['date']}"
    figure.suptitle(title, fontsize=11)
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    figure.savefig(out)


def _ranges(found: list[dict[str, Any]]) -> list[list[float]]:
    """How far the slowest and the fastest round lie from the median."""
    below = [each["tokens_per_s"] - min(each["rounds_tokens_per_s"]) for each in found]
    above = [max(each["rounds_tokens_per_s"]) - each["tokens_per_s"] for each in found]
    return [below, above]


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
