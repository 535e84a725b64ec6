"""Which redis-server is taken."""

from __future__ import annotations

from pathlib import Path

import pytest

from control_plane.launcher import redis_server

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("said", "is_taken"),
    [("Redis server v=7.0.15 sha=0", True), ("Redis server v=6.2.6", True), ("v=6.0.16", False), ("?", False)],
)
def test_one_on_the_path_is_taken_if_it_is_new_enough(tmp_path: Path, monkeypatch, said: str, is_taken: bool) -> None:
    binary = tmp_path / "redis-server"
    binary.write_text(f"#!/bin/sh\necho '{said}'\n")
    binary.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert (redis_server.find_binary() == binary) == is_taken
