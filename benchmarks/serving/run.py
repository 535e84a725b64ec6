"""One run of the serving benchmark: its options, and what every scenario needs to start engines and tell of it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.bench import ROOT, Bench, Failed, Reasons
from benchmarks.engines import ENGINES, Limits
from benchmarks.serving.triton import Triton

T = TypeVar("T")


@dataclass(frozen=True)
class Options:
    """What was asked for; the result repeats it.

    ``waves`` requests of each client, ``num_new`` tokens of each answer. ``precision`` is what scenarios measure that
    concern llmos alone.
    """

    engines: tuple[str, ...]
    clients: tuple[int, ...]
    rounds: int
    waves: int
    num_new: int
    num_threads: int
    precision: str
    num_requests: int
    quick: bool


@dataclass
class Run:
    """``home`` is a temporary folder; ``absent`` and ``versions`` are filled in as engines are tried."""

    bench: Bench
    options: Options
    home: Path
    absent: Reasons = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    _tritons: dict[tuple[Path, str], Triton] = field(default_factory=dict)

    def triton(self, name: str, bench: Bench | None = None, **engine: Any) -> Triton:
        """A Triton for the version that llmos exported as ``name``; raises Failed. Made once per run and version."""
        bench = bench or self.bench
        key = (bench.checkpoint, name)
        if key not in self._tritons:
            bench.prepare(name)
            settings = {"num_threads": self.options.num_threads, "max_num_seqs": max(32, *self.options.clients)}
            home = self.home / f"{bench.checkpoint.name}-{name}"
            self._tritons[key] = Triton(bench.folder_of(name), home, **settings, **engine)
        self.versions |= {package: version(package) for package in ENGINES[name].packages}
        return self._tritons[key]

    @property
    def vocab_size(self) -> int:
        config = json.loads((self.bench.checkpoint / "config.json").read_text(encoding="utf-8"))
        return int(config["vocab_size"])

    def limits(self, max_rows: int, max_tokens: int) -> dict[str, int]:
        return vars(Limits(self.options.num_threads, max_rows, max_tokens))

    def process(self, module: str, task: dict[str, Any]) -> dict[str, Any]:
        """Run a module of ours as a process, which takes and gives JSON; raises Failed with its last line."""
        done = subprocess.run(
            [sys.executable, "-m", module, json.dumps(task)],
            cwd=ROOT,
            env=self.bench.environment(),
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise Failed(f"{module} failed: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    def progress(self, items: Iterable[tuple[str, T]], total: int) -> Iterator[T]:
        """Yield the items of a long loop, with their names and a bar on the terminal."""
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        with Progress(*columns, console=self.bench.console, transient=True) as bar:
            task = bar.add_task("", total=total)
            for name, item in items:
                self.bench.say(name)
                bar.update(task, description=name)
                yield item
                bar.advance(task)
