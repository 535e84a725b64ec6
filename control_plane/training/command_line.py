"""How a recipe is run as a program: options from its config's fields, events on stdout, signals, exit codes.

Exit codes: 0 trained · 1 failed or stopped (the last event is ``error``) · 2 wrong usage.
"""

from __future__ import annotations

import argparse
import dataclasses
import signal
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from control_plane.training.errors import TrainingCancelled, TrainingError
from control_plane.training.events import Events, events_on_stdout


def run_recipe(
    recipe: Callable[[Path, Any, Events], None],
    config_class: type[Any],
    steps: tuple[str, ...],
    description: str,
    arguments: Sequence[str] | None,
) -> int:
    """Call ``recipe(out, config, events)`` with what the command line says; returns the exit code."""
    options = vars(_parser(recipe, config_class, description).parse_args(arguments))
    events = events_on_stdout(steps)
    signal.signal(signal.SIGTERM, _cancel)
    signal.signal(signal.SIGINT, _cancel)
    try:
        recipe(options.pop("out"), config_class(**options), events)
    except TrainingError as error:
        events.emit("error", code=error.code, message=str(error))
        return 1
    except Exception as error:
        traceback.print_exc()
        events.emit("error", code=TrainingError.code, message=f"{type(error).__name__}: {error}")
        return 1
    return 0


def _parser(recipe: Callable[..., None], config_class: type[Any], description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m control_plane.training.recipes.{recipe.__name__}",
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write; must not exist or be empty")
    for field in dataclasses.fields(config_class):
        option = "--" + field.name.replace("_", "-")
        parser.add_argument(option, type=type(field.default), default=field.default, help=" ")
    return parser


def _cancel(signum: int, frame: FrameType | None) -> NoReturn:
    signal.signal(signum, signal.SIG_IGN)  # a second signal must not stop the removal of the staging folder
    raise TrainingCancelled(f"training was stopped by {signal.Signals(signum).name}; nothing was written")
