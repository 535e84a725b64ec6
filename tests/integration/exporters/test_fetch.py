"""``python -m exporters.fetch``: a checkpoint without anything that could run code, sealed, or a reason why not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from triton_backend.version_folder import digest, verify

pytestmark = pytest.mark.integration
ROOT = Path(__file__).resolve().parents[3]


def fetch(source: str | Path, out: Path, **variables: str) -> tuple[int, dict[str, Any]]:
    """Exit code and last event."""
    command = [sys.executable, "-m", "exporters.fetch", "--", str(source), str(out)]
    environment = {**os.environ, **variables}
    ended = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60)
    return ended.returncode, json.loads(ended.stdout.splitlines()[-1])


@pytest.fixture
def checkpoint(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint("llama")


def test_the_copy_is_sealed_and_holds_only_what_an_export_reads(checkpoint: Path, tmp_path: Path):
    (checkpoint / "modeling_evil.py").write_text("raise SystemExit")
    (checkpoint / "pytorch_model.bin").write_bytes(b"\x80\x04pickle")
    (checkpoint / "1_Pooling").mkdir()
    (checkpoint / "1_Pooling" / "config.json").write_text("{}")
    (checkpoint / "onnx").mkdir()
    (checkpoint / "onnx" / "config.json").write_text("{}")
    (checkpoint / "manifest.json").write_text("{}")
    out = tmp_path / "out"
    code, finished = fetch(checkpoint, out)
    assert (code, finished["event"], finished["digest"]) == (0, "finished", digest(out))
    manifest = verify(out)
    assert manifest["source"] == {"kind": "checkpoint", "source": str(checkpoint)}
    assert {Path(name).suffix for name in manifest["files"]} == {".json", ".jinja", ".safetensors"}
    assert "1_Pooling/config.json" in manifest["files"] and "onnx/config.json" not in manifest["files"]
    assert (out / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_pickle_alone_code_and_links_are_refused_and_nothing_is_left(checkpoint: Path, tmp_path: Path):
    out = tmp_path / "out"
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "evil.Model"}}))
    assert "auto_map" in fetch(checkpoint, out)[1]["message"]
    (checkpoint / "config.json").write_text(json.dumps(config))
    (checkpoint / "extra.json").symlink_to("/etc/passwd")
    assert "outside the checkpoint" in fetch(checkpoint, out)[1]["message"]
    (checkpoint / "extra.json").unlink()
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    code, error = fetch(checkpoint, out)
    assert code == 1 and "pickle file" in error["message"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("source", ["some/model", "/nonexistent", "a/b/c"])
def test_what_is_no_folder_and_cannot_be_downloaded_says_so(tmp_path: Path, source: str):
    hub = {"HF_ENDPOINT": "http://127.0.0.1:1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    code, error = fetch(source, tmp_path / "out", **hub)
    assert (code, error["event"]) == (1, "error")
    assert (source in error["message"] and "expected" in error["message"]) or "check the name" in error["message"]
