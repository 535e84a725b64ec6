"""A whole installation for the tests: real Triton, Redis, web and worker, started by ``llmos up --detach``.

It lives in a temporary LLMOS_HOME with ports of its own and serves a small model that was really trained, exported and
proven. The checkpoint is kept in pytest's cache until the recipe changes; Triton is installed once, in the repository's
own ``.triton``.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from control_plane.registry import model_processes, serving_state
from control_plane.registry.serving_state import LOADED
from control_plane.settings import PROJECT_ROOT, Settings

LLMOS = (sys.executable, "-m", "control_plane.cli")
TRAINING = ("--max-steps=60", "--hidden-size=128", "--intermediate-size=256", "--num-hidden-layers=2")
MODEL = "starter"


def wait_for(is_true: Callable[[], object], timeout_s: float, what: str) -> float:
    """Wait until ``is_true()`` and return how many seconds that took."""
    started_at = time.monotonic()
    while not is_true():
        if time.monotonic() - started_at > timeout_s:
            raise AssertionError(f"{what} did not happen within {timeout_s:g} s")
        time.sleep(0.1)
    return time.monotonic() - started_at


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def new_environment(home: Path) -> dict[str, str]:
    """Environment of an installation of its own in ``home``."""
    ports = [str(port) for port in free_ports(5)]
    names = ("WEB", "TRITON_HTTP", "TRITON_GRPC", "TRITON_METRICS", "REDIS")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LLMOS_")}
    environment |= {f"LLMOS_{name}_PORT": port for name, port in zip(names, ports, strict=True)}
    environment |= {
        "LLMOS_HOME": str(home),
        "LLMOS_MODEL_REPOSITORY": str(home / "model_repository"),
        "LLMOS_TRITON_DIR": str(PROJECT_ROOT / ".triton"),
        "LLMOS_STARTER_MODEL": MODEL,
        "COLUMNS": "200",
    }
    return environment


def llmos(environment: dict[str, str], *arguments: str, timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
    """Run the command line interface to its end."""
    return subprocess.run(
        [*LLMOS, *arguments], env=environment, cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=timeout_s
    )


@dataclass(frozen=True)
class Stack:
    """A running installation. ``checkpoint`` is the Hugging Face folder that its model was exported from."""

    home: Path
    settings: Settings
    env: dict[str, str]
    web_url: str
    http_url: str
    grpc_url: str
    api_key: str
    model: str
    checkpoint: Path
    up_output: str

    def stub_pid(self, model: str = MODEL, version: int = 1) -> int | None:
        """Process id of the model's process, None while there is none."""
        return next((p.pid for p in model_processes.stub_processes(self.settings, model, version)), None)

    def triton_pid(self) -> int | None:
        process = model_processes.server_process(self.settings)
        return process.pid if process else None

    def model_state(self, model: str = MODEL) -> str | None:
        state = serving_state.read(self.settings).models.get(model)
        return state.state if state else None

    def wait_loaded(self, model: str = MODEL, timeout_s: float = 30) -> float:
        return wait_for(lambda: self.model_state(model) == LOADED, timeout_s, f"model {model} loaded")

    def llmos(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return llmos(self.env, *arguments)


@pytest.fixture(scope="session")
def checkpoint(request: pytest.FixtureRequest) -> Path:
    """A small trained checkpoint, made once per version of the recipe."""
    digest = hashlib.sha256(" ".join(TRAINING).encode())
    for source in sorted((PROJECT_ROOT / "control_plane" / "training").rglob("*.py")):
        digest.update(source.read_bytes())
    folder = request.config.cache.mkdir("llmos_checkpoints") / digest.hexdigest()[:16]
    if not (folder / "config.json").is_file():
        recipe = [sys.executable, "-m", "control_plane.training.recipes.pretrain", str(folder), *TRAINING]
        trained = subprocess.run(recipe, cwd=PROJECT_ROOT, capture_output=True, text=True)
        assert trained.returncode == 0, trained.stdout[-1000:] + trained.stderr[-1000:]
    return folder


@pytest.fixture(scope="session")
def stack(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    home = tmp_path_factory.mktemp("llmos")
    environment = new_environment(home)
    settings = Settings.from_environment(environment)
    settings.checkpoints_dir.mkdir(parents=True)
    (settings.checkpoints_dir / MODEL).symlink_to(checkpoint)
    try:
        started = llmos(environment, "up", "--detach")
        assert started.returncode == 0, started.stdout + started.stderr
        key = re.search(r"llmos_[0-9a-f]+_[\w-]+", started.stdout)
        assert key, started.stdout
        yield Stack(
            home=home,
            settings=settings,
            env=environment,
            web_url=f"http://127.0.0.1:{settings.web_port}",
            http_url=f"http://{settings.triton_http_url}",
            grpc_url=settings.triton_grpc_url,
            api_key=key.group(),
            model=MODEL,
            checkpoint=checkpoint,
            up_output=started.stdout,
        )
    finally:
        llmos(environment, "down")
