"""Embeddings from an exported encoder graph, with nothing but ONNX Runtime.

``Embedder`` is for this process. ``EmbedderProcess`` runs it as a child, ``python -m exporters.embedder FOLDER``, with
JSON lines in and out, so that what is measured is the memory and the speed of serving alone:

    in   {"rows": [[101, 2023, 102], …]}
    out  {"embeddings": [[0.12, …], …], "elapsed_s": 0.012, "peak_rss_bytes": 123456789}
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import onnxruntime as ort

from exporters.errors import EngineFailed
from exporters.session import open_session
from triton_backend.config import VersionConfig


def pad(rows: Sequence[Sequence[int]], length: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(input_ids, attention_mask), both int64 (B, S), of ``rows`` padded on the right to the longest or ``length``."""
    num_tokens = max(map(len, rows)) if length is None else length
    ids = np.zeros((len(rows), num_tokens), np.int64)
    mask = np.zeros((len(rows), num_tokens), np.int64)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
    return ids, mask


class Embedder:
    """Runs the graph of an encoder. Owned by one thread."""

    def __init__(self, graph: Path, device: str = "cpu") -> None:
        self._session = open_session(graph, device, ort.SessionOptions())

    @classmethod
    def of(cls, folder: Path) -> Embedder:
        """Of the version in ``folder``."""
        config = VersionConfig.read(folder)
        return cls(folder / config.model.graph, config.engine.device)

    def __call__(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """Embeddings (B, E') of ``rows`` of token ids, computed as one batch."""
        return self.run(*pad(rows))["embeddings"]

    def run(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> dict[str, np.ndarray]:
        """Every output by name: ``last_hidden_state`` (B, S, E) and ``embeddings`` (B, E')."""
        outputs = self._session.run(None, {"input_ids": input_ids, "attention_mask": attention_mask})
        return dict(zip((output.name for output in self._session.get_outputs()), outputs, strict=True))


def embed(folder: Path, rows: Sequence[Sequence[int]]) -> np.ndarray:
    """Embeddings (B, E') of ``rows`` of token ids by the version in ``folder``, computed as one batch."""
    return Embedder.of(folder)(rows)


@dataclass(frozen=True)
class Embedded:
    """One batch: embeddings (B, E'), how long the graph took, and the child's peak memory so far."""

    embeddings: np.ndarray
    elapsed_s: float
    peak_rss_bytes: int | None


class EmbedderProcess:
    """A running child; it ends when its stdin is closed, also when that is because we died."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stderr = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (closed in __exit__)
        # The child must find our packages whether they are installed or run from a source folder.
        sources = str(Path(__file__).resolve().parent.parent)
        path = os.pathsep.join(filter(None, (sources, os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "exporters.embedder", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": path},
        )

    def __enter__(self) -> EmbedderProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        if kind is not None:
            self._process.kill()
        self._process.wait()
        self._process.stdout.close()
        self._stderr.close()

    def __call__(self, rows: Sequence[Sequence[int]]) -> Embedded:
        """Raises EngineFailed with the child's last words if it did not answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"rows": [list(row) for row in rows]}) + "\n")
            self._process.stdin.flush()
        # Answers are JSON objects; what does not look like one was printed by a library.
        line = next((line for line in self._process.stdout if line.startswith("{")), None)
        if line is None:
            self._stderr.flush()
            self._stderr.seek(0)
            last_lines = " | ".join(self._stderr.read().strip().splitlines()[-5:])
            raise EngineFailed(f"the embedder on {self._folder} ended before it answered: {last_lines or '(no words)'}")
        answer = json.loads(line)
        return Embedded(np.array(answer["embeddings"], np.float32), answer["elapsed_s"], answer["peak_rss_bytes"])


def main() -> int:
    embedder = Embedder.of(Path(sys.argv[1]))
    for line in sys.stdin:
        rows = json.loads(line)["rows"]
        started = time.perf_counter()
        embeddings = embedder(rows)
        elapsed_s = time.perf_counter() - started
        answer = {
            "embeddings": embeddings.astype(float).tolist(),
            "elapsed_s": elapsed_s,
            "peak_rss_bytes": _peak_rss_bytes(),
        }
        print(json.dumps(answer), flush=True)
    return 0


def _peak_rss_bytes() -> int | None:
    """Of this program; what getrusage says includes the parent's memory at the time of its fork."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


if __name__ == "__main__":
    sys.exit(main())
