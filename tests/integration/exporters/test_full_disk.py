"""A disk that fills up in the middle of an export: the error says so, and nothing half-made is left."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from exporters import ExportConfig, export
from exporters.errors import OutOfSpace
from tests.disks import small_disk

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(name="small_disk")
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A file system of 128 KiB, smaller than the weights."""
    with small_disk(tmp_path / "disk", "128k") as folder:
        yield folder


def test_a_full_disk_leaves_nothing_behind(llama_checkpoint: Path, small_disk: Path) -> None:
    out = small_disk / "models" / "chat" / "1"
    with pytest.raises(OutOfSpace, match=r"the disk is full .*; nothing was kept: free some space") as caught:
        export(ExportConfig(str(llama_checkpoint), out, max_model_len=48), certify=False)
    assert str(out) in str(caught.value)
    assert list(out.parent.iterdir()) == []
    assert os.statvfs(small_disk).f_bfree * os.statvfs(small_disk).f_bsize > 100_000, "the space is free again"


def test_a_file_that_may_not_grow_is_reported_by_the_program(llama_checkpoint: Path, tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    command = [sys.executable, "-m", "exporters", str(llama_checkpoint), str(tmp_path / "out" / "1"), "--no-certify"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, preexec_fn=limit)
    assert result.returncode == 1
    last = json.loads(result.stdout.splitlines()[-1])
    assert (last["event"], last["code"]) == ("error", "OUT_OF_SPACE"), result.stderr[-2000:]
    assert str(tmp_path / "out" / "1") in last["message"]
    assert list((tmp_path / "out").iterdir()) == []
