"""What every benchmark needs: where files lie, the machine's facts, and engines in processes of their own.

``Bench`` makes an engine's files of one checkpoint once, keeps them in ``.cache`` until something that decides them
changes, and runs tasks of ``benchmarks.worker`` in the environment of the engine. What a worker cannot do becomes
``Failed``, whose message a table can show.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from benchmarks import checkpoint as checkpoints
from benchmarks import environment
from benchmarks.engines import ENGINES, REFERENCE, EngineSpec

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "benchmarks" / ".cache"
RESULTS = ROOT / "benchmarks" / "results"
PREPARED = "prepared.json"
BUSY_LOAD = 0.5

Reasons = dict[str, str]


class Failed(Exception):
    """A worker could not do its task; the message is for the table."""


class Bench:
    """One run: where its files are and how its processes are started."""

    def __init__(self, checkpoint: Path, num_threads: int, console: Console) -> None:
        self.checkpoint = checkpoint
        self.num_threads = num_threads
        self.console = console
        weights = [(path.name, path.stat().st_size, path.stat().st_mtime) for path in checkpoint.glob("*.safetensors")]
        self._identity = repr((str(checkpoint.resolve()), sorted(weights)))
        self._folder = CACHE / f"{checkpoint.name}-{hashlib.sha256(self._identity.encode()).hexdigest()[:8]}"

    def say(self, text: str) -> None:
        self.console.print(f"{datetime.datetime.now():%H:%M:%S} {text}", highlight=False)

    def folder_of(self, name: str) -> Path:
        """Where the files lie that ``prepare`` made for an engine."""
        return self._folder / (ENGINES[name].files or name)

    def prepare(self, name: str) -> None:
        """Make the engine's files of this checkpoint unless they are there; the marker is written last."""
        if ENGINES[name].files:
            return self.prepare(ENGINES[name].files)
        folder, wanted = self.folder_of(name), self._fingerprint(ENGINES[name])
        marker = self._folder / f"{name}.{PREPARED}"
        if marker.exists() and json.loads(marker.read_text(encoding="utf-8")) == wanted:
            return
        self.say(f"{name}: preparing")
        marker.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.work(name, do="prepare")
        marker.write_text(json.dumps(wanted), encoding="utf-8")

    def work(self, name: str, **task: Any) -> dict[str, Any]:
        """Do one task in a process of the engine's environment; raises Failed with the reason."""
        spec = ENGINES[name]
        python = str(environment.PYTHON) if spec.peer else sys.executable
        task |= {"engine": name, "checkpoint": str(self.checkpoint), "folder": str(self.folder_of(name))}
        log = self._folder / f"{name}.log"
        with log.open("w", encoding="utf-8") as stderr:
            done = subprocess.run(
                [python, "-m", "benchmarks.worker", json.dumps(task)],
                cwd=ROOT,
                env=self.environment(),
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        if done.returncode:
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no output"]
            raise Failed(f"{task['do']} ended with exit code {done.returncode}: {lines[-1]} (all of it: {log})")
        answer: dict[str, Any] = json.loads(done.stdout)
        if "unavailable" in answer:
            raise Failed(answer["unavailable"])
        return answer

    def judge(
        self,
        prompts: list[list[int]],
        texts: dict[str, list[list[int]]],
        limits: dict[str, int],
        reference: str = REFERENCE,
    ) -> dict[str, list[tuple[int, float]]]:
        """What the original thinks of every token that the engines wrote after ``prompts``, in one process."""
        every = [text for engine in texts.values() for text in engine]
        self.prepare(reference)
        answer = self.work(reference, do="judge", limits=limits, prompts=prompts * len(texts), texts=every)
        judged = iter([(int(rank), float(gap)) for rank, gap in answer["judged"]])
        return {name: [next(judged) for text in engine for _ in text] for name, engine in texts.items()}

    @contextlib.contextmanager
    def leaving_out(self, name: str, absent: Reasons) -> Iterator[None]:
        """Note in ``absent`` why ``name`` cannot go on, and go on without it."""
        try:
            yield
        except Failed as reason:
            self.console.print(f"{name} is left out: {reason}", style="yellow", markup=False, soft_wrap=True)
            absent[name] = str(reason)

    def environment(self) -> dict[str, str]:
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(self.num_threads), "HF_HUB_OFFLINE": "1"}

    def _fingerprint(self, spec: EngineSpec) -> str:
        """Changes with everything that decides what ``prepare`` writes."""
        patterns = (f"benchmarks/engines/{spec.module}.py", "benchmarks/requirements*.txt", "constraints.txt")
        paths = sorted(path for pattern in (*patterns, *spec.sources) for path in ROOT.glob(pattern))
        contents = hashlib.sha256(self._identity.encode())
        for path in paths:
            contents.update(path.read_bytes())
        return contents.hexdigest()


def seeded_checkpoint() -> Path:
    folder = CACHE / checkpoints.name()
    if not (folder / "config.json").exists():
        subprocess.run([sys.executable, "-m", "benchmarks.checkpoint", str(folder)], cwd=ROOT, check=True)
    return folder


def rotated(names: Sequence[str], number: int) -> list[str]:
    """Every round begins with another engine, so that none always runs after the same one."""
    first = number % max(1, len(names))
    return [*names[first:], *names[:first]]


def machine(device: str = "cpu") -> dict[str, Any]:
    """Where this ran, as far as it decides the numbers."""
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in _read("/proc/cpuinfo").splitlines()
            if line.startswith("model name")
        ),
        platform.processor() or platform.machine(),
    )
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return {
        **({"gpu": _gpu()} if device == "cuda" else {}),
        "cpu": cpu,
        "physical_cores": psutil.cpu_count(logical=False),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or "unknown",
        "nice": os.nice(0),
        "load_before": round(os.getloadavg()[0], 2),
    }


def _gpu() -> str:
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
