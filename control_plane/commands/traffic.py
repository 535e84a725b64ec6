"""``llmos models traffic``: production beside the canary, with the difference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from control_plane.commands.api import AsJson, connected, print_json, print_table

ROWS = {
    "requests": ("requests", "{:.0f}", 1),
    "requests/s": ("requests_per_s", "{:.2f}", 1),
    "errors, %": ("error_share", "{:.2f}", 100),
    "first token p50, ms": ("first_token_p50_s", "{:.0f}", 1000),
    "first token p95, ms": ("first_token_p95_s", "{:.0f}", 1000),
    "answer p50, ms": ("end_p50_s", "{:.0f}", 1000),
    "answer p95, ms": ("end_p95_s", "{:.0f}", 1000),
    "tokens/s of a request": ("tokens_per_s", "{:.1f}", 1),
    "prompt tokens": ("prompt_tokens", "{:.0f}", 1),
    "generated tokens": ("completion_tokens", "{:.0f}", 1),
}
"""What a row is called: its figure, how it is written, and by what it is multiplied."""
OF_WEIGHT = ("requests", "requests_per_s", "prompt_tokens", "completion_tokens")
"""Figures that depend on the canary's weight: their difference says nothing."""


def traffic(
    name: Annotated[str, typer.Argument(help="A model.")],
    minutes: Annotated[int, typer.Option(min=1, max=1440, help="How far the recent part reaches back.")] = 5,
    as_json: AsJson = False,
) -> None:
    """What production and the canary met: rates, errors, times, and how they differ."""
    with connected() as llmos:
        found = llmos.traffic(name, minutes)
    if as_json:
        return print_json(found)
    if not found["is_complete"]:
        typer.echo("llmos: Redis does not answer; what it keeps is missing below", err=True)
    for title, window in (("since the canary began", found["since_canary"]), ("recently", found["recent"])):
        if window is not None:
            typer.echo(f"{title}: since {window['since'][:19]} UTC, {_duration(window['seconds'])}")
            print_table(_columns(window), _rows(window))


def _columns(window: Mapping[str, Any]) -> list[str]:
    shown = [f"{role} {window[role]['version']}" for role in ("production", "canary") if window[role]]
    return ["", *shown, *(["difference"] if len(shown) == 2 else [])]


def _rows(window: Mapping[str, Any]) -> list[list[str]]:
    sides = [window[role] for role in ("production", "canary") if window[role]]
    rows = [[title, *_cells(sides, *how)] for title, how in ROWS.items()]
    codes = sorted({code for side in sides for code in side["errors"]})
    return rows + [[f"errors: {code}", *(str(side["errors"].get(code, 0)) for side in sides)] for code in codes]


def _cells(sides: list[Mapping[str, Any]], figure: str, form: str, factor: float) -> list[str]:
    values = [side[figure] for side in sides]
    shown = ["" if value is None else form.format(value * factor) for value in values]
    return shown if len(sides) < 2 else [*shown, _difference(figure, *values)]


def _difference(figure: str, production: float | None, canary: float | None) -> str:
    """In percent of production; of shares in points."""
    if production is None or canary is None or figure in OF_WEIGHT:
        return ""
    if figure == "error_share":
        return f"{(canary - production) * 100:+.2f} points"
    return f"{(canary / production - 1) * 100:+.0f} %" if production else ""


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{hours:.1f} hours" if hours >= 2 else f"{minutes:.1f} minutes"
