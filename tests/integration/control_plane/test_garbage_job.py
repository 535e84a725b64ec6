"""The job ``garbage-collect``: says what would go, removes it, and stops when it is told to."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import sqlalchemy
from flask import Flask

from control_plane import create_app, upgrade_database
from control_plane.artifacts import Artifact, ArtifactStore, artifact_store
from control_plane.auth.tables import AuditEvent
from control_plane.extensions import db
from control_plane.jobs.tables import SUCCEEDED
from control_plane.registry import deployments, services
from control_plane.settings import Settings
from control_plane.triton_fake import FakeTriton
from tests.integration.control_plane.run_jobs import JobRuns
from tests.unit.control_plane.registry.conftest import sealed

pytestmark = pytest.mark.integration


@pytest.fixture
def app(settings: Settings, tmp_path: Path) -> Flask:
    """``chat`` has a production version; beside it lie an artifact of nobody and an old export of a job."""
    upgrade_database(settings)
    app = create_app(settings, FakeTriton({}))
    with app.app_context():
        for salt in ("served", "nobody's"):
            artifact_store(settings).put(sealed(tmp_path / salt, salt))
        services.register("chat", tmp_path / "served")
        deployments.adopt_production("chat", 1)
    export = shutil.copytree(tmp_path / "served", settings.versions_dir / "chat" / ("a" * 32))
    os.utime(export, (0, 0))
    return app


def test_a_dry_run_says_what_a_run_removes(app: Flask, settings: Settings):
    store, jobs = artifact_store(settings), JobRuns(app)
    before = store.digests()
    planned = jobs.run("garbage-collect", dry_run=True)
    assert planned.state == SUCCEEDED, planned.error
    assert [item["kind"] for item in planned.result["garbage"]] == ["artifact", "export"]
    assert store.digests() == before and len(before) == 2
    done = jobs.run("garbage-collect")
    assert done.result == {**planned.result, "dry_run": False}
    assert done.result["size_bytes"] == sum(item["size_bytes"] for item in done.result["garbage"]) > 0
    with app.app_context():
        assert store.digests() == [services.get_version("chat", 1).digest]
        removed = sqlalchemy.select(AuditEvent.object_id).where(AuditEvent.action == "garbage.remove")
        assert len(db.session.scalars(removed).all()) == 2
    assert not list(settings.versions_dir.glob("chat/*"))
    assert jobs.run("garbage-collect").result["num_items"] == 0


@pytest.mark.parametrize("url", ["memory://described", ""])
def test_artifacts_are_described_and_deleted_unless_needed_in_every_store(url: str, settings: Settings, tmp_path: Path):
    store = ArtifactStore(url or settings.artifacts_url)
    digest = store.put(sealed(tmp_path / "a", "a"))
    size_bytes = sum(path.stat().st_size for path in (tmp_path / "a").iterdir() if path.name != "manifest.json")
    assert store.describe(digest) == Artifact(digest, "version", size_bytes)
    assert not store.delete(digest, lambda found: found == digest) and store.has(digest)
    assert store.delete(digest) and not store.has(digest)
