"""What a person sees while something takes its time: step names with their duration, progress bars, plain lines without
a terminal.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from control_plane.subprocesses import ChildEvent


class Screen:
    """Prints steps. Owned by the main thread."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)

    def line(self, text: str = "") -> None:
        self.console.print(text, markup=False)

    def done(self, title: str, started_at: float | None = None) -> None:
        took = "" if started_at is None else f" ({time.monotonic() - started_at:.1f} s)"
        self.console.print("[green]✓[/green]", end=" ")
        self.line(f"{title}{took}")

    @contextmanager
    def step(self, title: str) -> Iterator[Callable[[str], None]]:
        """A step of unknown length; yields a function that says what it is at. Printed when it has succeeded."""
        started_at = time.monotonic()
        if self.console.is_terminal:
            with self.console.status(title) as status:
                yield lambda detail: status.update(f"{title}: {detail}")
        else:
            self.line(f"… {title}")
            yield lambda detail: None
        self.done(title, started_at)

    @contextmanager
    def child(self, title: str) -> Iterator[Callable[[ChildEvent], None]]:
        """The progress of one child process; yields the function that takes its events."""
        started_at = time.monotonic()
        if not self.console.is_terminal:
            self.line(f"… {title}")
            yield self._print_steps
        else:
            columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            with Progress(*columns, TimeElapsedColumn(), console=self.console, transient=True) as progress:
                task = progress.add_task(title, total=None)

                def show(event: ChildEvent) -> None:
                    self._print_lines(event)
                    if event.event in ("step", "progress"):
                        done, total = event.fields.get("done"), event.fields.get("total")
                        progress.update(task, description=f"{title}: {event.step}", completed=done, total=total)

                yield show
        self.done(title, started_at)

    def _print_steps(self, event: ChildEvent) -> None:
        self._print_lines(event)
        if event.event == "step" and "rss_bytes" not in event.fields:
            self.line(f"    {event.step}")

    def _print_lines(self, event: ChildEvent) -> None:
        """Log lines, warnings, and what a step took: a child that measures its steps says so when the next begins."""
        if event.event == "log":
            self.line(f"    {event.message}")
        if event.event == "warning":
            self.line(f"    warning: {event.message}")
        previous = event.fields.get("previous")
        if event.event == "step" and previous:
            mib = previous["peak_rss_bytes"] / (1 << 20)
            self.line(f"    {previous['step']:<10} {previous['seconds']:6.1f} s   peak {mib:6,.0f} MiB")
