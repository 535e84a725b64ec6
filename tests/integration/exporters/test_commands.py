"""``llmos export`` and ``llmos verify``, from the command line to the table."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[3]


def llmos(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LLMOS_")}
    environment |= {"LLMOS_HOME": str(home), "COLUMNS": "200"}
    command = [sys.executable, "-m", "control_plane.cli", *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=280)


def test_a_plan_writes_nothing_and_a_version_is_exported_shown_and_verified(
    llama_checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "chat" / "1"
    settings = ("--max-model-len", "48", "--max-num-seqs", "4", "--name", "chat", "--threshold", "max_kl_mean=0.1")
    plan = llmos(tmp_path, "export", str(llama_checkpoint), str(out), *settings, "--dry-run")
    assert plan.returncode == 0, plan.stderr
    assert "chat: LlamaForCausalLM" in plan.stdout and "48 tokens" in plan.stdout
    assert not out.parent.exists()

    exported = llmos(tmp_path, "export", str(llama_checkpoint), str(out), *settings)
    assert exported.returncode == 0, exported.stderr
    for words in ("trace", "peak", "passed", "16 of 16 equal", "nodes a layer", f"llmos verify {out}"):
        assert words in exported.stdout

    verified = llmos(tmp_path, "verify", str(out))
    assert verified.returncode == 0, verified.stderr
    assert "16 of 16 prompts give the recorded tokens" in verified.stdout
    failed = llmos(tmp_path, "verify", str(out), "--threshold", "max_kl_mean=0")
    assert failed.returncode == 3
    assert "FAILED: max_kl_mean" in failed.stdout
