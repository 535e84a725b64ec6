"""The job ``import``: a checkpoint becomes an artifact and a name that exports take."""

# ruff: noqa: F401, F811 (fixtures of another folder)
from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from flask import Flask

from control_plane import create_app, upgrade_database
from control_plane.artifacts import artifact_store
from control_plane.jobs.tables import SUCCEEDED
from control_plane.settings import Settings
from control_plane.triton_fake import FakeTriton
from tests.integration.control_plane.run_jobs import JobRuns, reason
from tests.integration.exporters.conftest import llama_checkpoint, make_checkpoint, tokenizer
from triton_backend.version_folder import digest, verify

pytestmark = pytest.mark.integration


@pytest.fixture
def jobs(settings: Settings) -> JobRuns:
    upgrade_database(settings)
    return JobRuns(create_app(settings, FakeTriton({})))


def test_an_imported_checkpoint_is_stored_and_exported_by_its_name(
    jobs: JobRuns, settings: Settings, llama_checkpoint: Path
):
    job = jobs.run("import", source=str(llama_checkpoint), name="tiny")
    assert job.state == SUCCEEDED, job.error
    folder = settings.checkpoints_dir / "tiny"
    assert verify(folder)["source"]["kind"] == "checkpoint"
    assert job.result["digest"] == digest(folder)
    assert artifact_store(settings).has(digest(folder))
    assert [path.name for path in settings.checkpoints_dir.iterdir()] == ["tiny"]
    settings_of_engine = {"deterministic": False, "stream_interval": 2}
    exported = jobs.run(
        "export", checkpoint="tiny", name="chat", max_num_seqs=4, engine=settings_of_engine, certify=False
    )
    assert exported.state == SUCCEEDED, exported.error
    engine = json.loads((Path(exported.result["folder"]) / "model.json").read_text())["engine"]
    assert (engine["max_num_seqs"], engine["deterministic"], engine["stream_interval"]) == (4, False, 2)


def test_an_import_that_was_killed_behind_its_download_goes_on_without_it(
    jobs: JobRuns, settings: Settings, llama_checkpoint: Path, tmp_path: Path
):
    source = shutil.copytree(llama_checkpoint, tmp_path / "source")
    job = jobs.run("import", source=str(source), name="tiny")
    shutil.rmtree(source)
    shutil.rmtree(settings.checkpoints_dir / "tiny")
    again = jobs.again(job, {name: job.steps[name] for name in ("fetch", "store")})
    assert (again.state, again.result) == (SUCCEEDED, job.result)
    # Killed behind the last step, too.
    assert jobs.again(job, {name: job.steps[name] for name in ("fetch", "store")}).state == SUCCEEDED


def test_the_name_of_another_checkpoint_is_not_taken_over(
    jobs: JobRuns, settings: Settings, llama_checkpoint: Path, make_checkpoint
):
    shutil.copytree(llama_checkpoint, settings.checkpoints_dir / "trained")
    assert "import this one under another name" in reason(
        jobs.run("import", source=str(llama_checkpoint), name="trained")
    )
    assert jobs.run("import", source=str(llama_checkpoint), name="tiny").state == SUCCEEDED
    assert jobs.run("import", source=str(llama_checkpoint), name="tiny").state == SUCCEEDED
    other = make_checkpoint("llama", seed=1)
    assert "another checkpoint 'tiny'" in reason(jobs.run("import", source=str(other), name="tiny"))


def test_a_hub_that_cannot_be_reached_is_said(jobs: JobRuns, settings: Settings, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    said = reason(jobs.run("import", source="some/model", name="tiny"))
    assert "some/model is neither a folder nor a model that could be fetched from the Hub" in said
    assert not settings.checkpoints_dir.exists()
