"""``python plot.py RESULT.json OUT.svg``: one panel per number of rows, a bar per engine; needs matplotlib only."""

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
    rows = [str(n) for n in document["settings"]["rows"]]
    names = [f"{engine['label']} {engine['precision']}" for engine in engines]
    panels = [(f"decode step, {n} row{'s' * (n != '1')}", [engine["decode"][n] for engine in engines]) for n in rows]
    panels.append((f"prefill, {document['settings']['prefill']} tokens", [engine["prefill"] for engine in engines]))

    figure, axes = pyplot.subplots(1, len(panels), figsize=(4 * len(panels), 1.2 + 0.35 * len(names)), sharey=True)
    for axis, (title, found) in zip(axes, panels, strict=True):
        times = [value["median_ms"] for value in found]
        below = [value["median_ms"] - value["min_ms"] for value in found]
        above = [value["max_ms"] - value["median_ms"] for value in found]
        colours = [COLOURS[engine["precision"]] for engine in engines]
        bars = axis.barh(names, times, xerr=[below, above], color=colours, error_kw={"ecolor": "#555555", "lw": 1})
        axis.bar_label(bars, fmt="%.0f", padding=4, fontsize=8)
        axis.margins(x=0.18)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("ms, less is better", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    used = [p for p in COLOURS if any(engine["precision"] == p for engine in engines)]
    figure.legend([Patch(color=COLOURS[p]) for p in used], used, loc="lower left", ncols=len(used), fontsize=8)
    figure.suptitle(f"{document['model']['name']} on {document['machine']['cpu']}, {document['date']}", fontsize=11)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(out)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
