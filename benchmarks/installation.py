"""What benchmarks of a running installation share: its address and key, how they sum up waits, and where they write."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from control_plane.secrets import local_api_key
from control_plane.settings import Settings

RESULTS = Path(__file__).parent / "results"


def settings_and_key() -> tuple[Settings, str]:
    """Of the installation that ``LLMOS_HOME`` names; raises SystemExit if there is no API key for it."""
    settings = Settings.from_environment()
    key = settings.api_key or local_api_key(settings)
    if key is None:
        raise SystemExit("there is no API key; run llmos up first, or set LLMOS_API_KEY")
    return settings, key


def spread(waits_s: Sequence[float]) -> dict[str, float]:
    """Median, 95th percentile and largest of some waits, in seconds."""
    ordered = sorted(waits_s)
    p95 = ordered[max(0, -(-len(ordered) * 95 // 100) - 1)]
    return {"p50_s": round(statistics.median(ordered), 4), "p95_s": round(p95, 4), "max_s": round(ordered[-1], 4)}


def write(name: str, result: Mapping[str, Any]) -> None:
    """Print ``result``, which has an ISO ``date``, and write it to results/NAME-DATE.json."""
    text = json.dumps(result, indent=2)
    (RESULTS / f"{name}-{result['date'][:10]}.json").write_text(text + "\n", encoding="utf-8")
    print(text)
