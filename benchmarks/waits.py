"""``python -m benchmarks.waits``: how long the control plane lets people wait, for lists and for the start of a job.

Lists are asked of an application with 10,000 versions in a SQLite database of its own, without a network. A job waits
from its submission until its child process runs; that needs a running installation (``llmos up``) on this machine,
whose heavy worker is idle. Written to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import httpx
import psutil

from benchmarks.installation import settings_and_key, spread, write
from control_plane import create_app, upgrade_database
from control_plane.auth.services import create_key
from control_plane.client import ControlPlane
from control_plane.extensions import db
from control_plane.registry.tables import Model, Version
from control_plane.settings import Settings
from control_plane.supervision import SupervisorClient
from control_plane.triton_fake import FakeTriton

NUM_VERSIONS = 10_000
NUM_MODELS = 100
"""All but one have few versions; the last one has half of them."""
LISTS = {
    "models": "/api/v1/models?limit=200",
    "versions": f"/api/v1/models/model-{NUM_MODELS - 1:03}/versions?limit=200",
    "oldest versions": f"/api/v1/models/model-{NUM_MODELS - 1:03}/versions?limit=200&before=201",
}
CERTIFICATE = {"passed": True, "num_tokens_compared": 4096, "max_logit_difference": 1.3e-5, "kl_divergence": 2e-9}
SOURCE = {"checkpoint": "org/model", "files": {f"model-{number}.safetensors": "0" * 64 for number in range(4)}}
START_LIMIT_S = 30.0


def fill_registry() -> None:
    """Rows as ``publish`` makes them, of versions that exist nowhere. Needs an application context."""
    models = [Model(name=f"model-{number:03}", created_by="benchmark") for number in range(NUM_MODELS)]
    db.session.add_all(models)
    db.session.flush()
    few = NUM_VERSIONS // 2 // (NUM_MODELS - 1)
    counts = [few] * (NUM_MODELS - 1) + [NUM_VERSIONS - few * (NUM_MODELS - 1)]
    facts = {"architecture": "LlamaForCausalLM", "precision": "int8", "size_bytes": 135_000_000, "passed": True}
    facts |= {"certificate": CERTIFICATE, "source": SOURCE, "created_by": "benchmark"}
    for model, count in zip(models, counts, strict=True):
        for number in range(1, count + 1):
            db.session.add(Version(model_id=model.id, number=number, digest=f"{model.id:032}{number:032}", **facts))
    db.session.commit()


def measure_lists(count: int) -> dict[str, dict[str, float]]:
    """How long each list takes, from the request to the last byte of its answer."""
    with tempfile.TemporaryDirectory() as home:
        settings = Settings.from_environment(
            {"LLMOS_HOME": home, "LLMOS_MODEL_REPOSITORY": f"{home}/models", "LLMOS_REDIS_URL": "redis://127.0.0.1:1/0"}
        )
        upgrade_database(settings)
        app = create_app(settings, FakeTriton({}))
        with app.app_context():
            fill_registry()
            headers = {"Authorization": f"Bearer {create_key('benchmark', 'viewer')}"}
        with httpx.Client(transport=httpx.WSGITransport(app), base_url="http://llmos", headers=headers) as client:
            return {name: spread([_ask(client, path) for _ in range(count)]) for name, path in LISTS.items()}


def _ask(client: httpx.Client, path: str) -> float:
    asked_at = time.monotonic()
    answer = client.get(path)
    wait_s = time.monotonic() - asked_at
    answer.raise_for_status()
    return wait_s


def measure_starts(llmos: ControlPlane, settings: Settings, count: int) -> list[float]:
    """Seconds from the submission of a proof of a folder that is not there until its process runs."""
    (pid,) = (process.pid for process in SupervisorClient(settings).processes() if process.name == "worker-heavy")
    worker, waits = psutil.Process(pid), []
    for number in range(count):
        folder = f"/nonexistent/{number}"
        asked_at = time.monotonic()
        job = llmos.submit_job("verify", {"folder": folder})
        _wait_for(lambda folder=folder: any(folder in child.cmdline() for child in worker.children()))
        waits.append(time.monotonic() - asked_at)
        _wait_for(lambda job=job: llmos.job(job["id"])["state"] == "FAILED")
        print(f"job {number + 1} of {count}: its child ran after {waits[-1] * 1000:.0f} ms", flush=True)
    return waits


def _wait_for(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while True:
        try:
            if is_true():
                return
        except psutil.Error:
            pass  # It ended while it was looked at.
        if time.monotonic() > deadline:
            raise SystemExit(f"nothing happened for {START_LIMIT_S:g} s; see llmos logs worker-heavy")
        time.sleep(0.002)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lists", type=int, default=50)
    parser.add_argument("--jobs", type=int, default=20)
    given = parser.parse_args(arguments)
    settings, key = settings_and_key()
    result: dict[str, Any] = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "num_versions": NUM_VERSIONS}
    with ControlPlane(settings.web_url, key) as llmos:
        result["job_starts"] = spread(measure_starts(llmos, settings, given.jobs))
    result["lists"] = measure_lists(given.lists)
    write("waits", result)


if __name__ == "__main__":
    main()
