"""The job ``evaluate``: metrics of real versions are recorded, once, wherever the version lies."""

# ruff: noqa: F401, F811 (fixtures of another folder)
from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import sqlalchemy
from flask import Flask

from control_plane import create_app, upgrade_database
from control_plane.artifacts import artifact_store
from control_plane.errors import Conflict
from control_plane.extensions import db
from control_plane.jobs import runner
from control_plane.jobs.tables import SUCCEEDED
from control_plane.registry import aliases, deployments, model_directory, services, serving_state
from control_plane.registry.places import Place
from control_plane.registry.serving_state import LOADED, ModelState, ServingState
from control_plane.registry.tables import Evaluation
from control_plane.secrets import store_local_api_key
from control_plane.settings import Settings
from control_plane.subprocesses import run_child
from control_plane.triton_fake import FakeTriton
from tests.integration.control_plane.run_jobs import JobRuns, reason
from tests.integration.exporters.conftest import (
    llama_checkpoint,
    llama_version,
    make_checkpoint,
    tokenizer,
)

pytestmark = pytest.mark.integration
TEXT = "The quick brown fox jumps over the lazy dog.\n" * 4
KEY = "llmos_0123456789ab_secret"


@pytest.fixture
def app(settings: Settings, llama_version: Path) -> Flask:
    """Version 1 of ``chat`` lies in the artifact store and is not installed."""
    upgrade_database(settings)
    app = create_app(settings, FakeTriton({}))
    with app.app_context():
        artifact_store(settings).put(llama_version)
        services.register("chat", llama_version)
        aliases.set_own("chat", "stable", 1)
    return app


@pytest.fixture
def jobs(app: Flask) -> JobRuns:
    return JobRuns(app)


@pytest.fixture
def data(tmp_path: Path) -> str:
    path = tmp_path / "held-out.txt"
    path.write_text(TEXT)
    return str(path)


def recorded(app: Flask) -> list[Evaluation]:
    with app.app_context():
        found = list(db.session.scalars(sqlalchemy.select(Evaluation)))
        db.session.expunge_all()
        return found


@pytest.mark.parametrize("version", [None, 1, "1", "stable"])
def test_metrics_of_a_version_in_the_store_are_recorded(
    app: Flask, jobs: JobRuns, data: str, settings, version
) -> None:
    given = {} if version is None else {"version": version}
    job = jobs.run("evaluate", name="chat", suite="perplexity", data=data, **given)
    assert job.state == SUCCEEDED, job.error
    (evaluation,) = recorded(app)
    assert (evaluation.suite, evaluation.job_id) == ("perplexity", job.id)
    assert evaluation.metrics["bits_per_byte"] > 0 and evaluation.metrics == job.result["metrics"]
    assert evaluation.data.startswith(f"{data} sha256:")
    assert not (settings.jobs_dir / job.id).exists()


def test_what_was_recorded_lets_a_version_through_the_gate_or_not(app: Flask, jobs: JobRuns, data: str) -> None:
    jobs.run("evaluate", name="chat", suite="perplexity", data=data, limit=10)
    with app.app_context():
        version = services.get_version("chat", 1)
        version.passed = True
        services.edit_model("chat", {"thresholds": {"perplexity.bits_per_byte": {"max": 0.01}}}, None)
        with pytest.raises(Conflict, match=r"perplexity\.bits_per_byte is .*; expected at most 0\.01"):
            deployments.deploy("chat", "promote", ServingState, number=1)


def test_a_job_that_was_killed_behind_its_record_records_no_second_one(app: Flask, jobs: JobRuns, data: str) -> None:
    job = jobs.run("evaluate", name="chat", suite="perplexity", data=data)
    again = jobs.again(job, {name: job.steps[name] for name in ("find", "evaluate")})
    assert (again.state, again.result) == (SUCCEEDED, job.result)
    assert len(recorded(app)) == 1


def test_a_version_that_was_found_stays_the_one_when_the_alias_moves(
    app: Flask,
    jobs: JobRuns,
    tmp_path: Path,
    llama_version: Path,
    settings,
) -> None:
    missing = tmp_path / "later.txt"
    job = jobs.run("evaluate", name="chat", version="stable", suite="perplexity", data=str(missing))
    assert str(missing) in reason(job)
    with app.app_context():
        other = shutil.copytree(llama_version, tmp_path / "other")
        (other / "manifest.json").write_text(json.dumps(json.loads((other / "manifest.json").read_text())))
        services.register("chat", other)
        aliases.set_own("chat", "stable", 2)
    missing.write_text(TEXT)
    assert jobs.again(job).state == SUCCEEDED
    with app.app_context():
        assert services.find_evaluations("chat", 1, None, 10) and not services.find_evaluations("chat", 2, None, 10)


def test_an_installed_version_is_not_fetched(app: Flask, jobs: JobRuns, data: str, settings, llama_version) -> None:
    model_directory.install(llama_version, settings.model_repository, "chat", 1)
    with app.app_context():
        artifact_store(settings).delete(services.get_version("chat", 1).digest)
    assert jobs.run("evaluate", name="chat", suite="perplexity", data=data).state == SUCCEEDED


def test_what_cannot_be_evaluated_says_why(app: Flask, jobs: JobRuns, data: str, settings) -> None:
    assert "no version 7" in reason(jobs.run("evaluate", name="chat", version=7, suite="perplexity", data=data))
    assert "no alias 'best'" in reason(jobs.run("evaluate", name="chat", version="best", suite="certificate"))
    assert "model 'none' does not exist" in reason(jobs.run("evaluate", name="none", suite="certificate"))
    assert "has no certificate" in reason(jobs.run("evaluate", name="chat", suite="certificate"))
    with app.app_context():
        aliases.delete_own("chat", "stable")
        deployments.retire("chat", 1)
    assert "is retired" in reason(jobs.run("evaluate", name="chat", suite="perplexity", data=data))
    assert recorded(app) == []


def test_lm_eval_needs_a_version_that_is_loaded_and_says_how_to_load_it(jobs: JobRuns, data: str) -> None:
    job = jobs.run("evaluate", name="chat", suite="lm-eval", data=[data])
    assert "llmos canary chat 1 --weight 0" in reason(job)


def test_lm_eval_gets_the_key_through_the_environment_only(
    app: Flask, jobs: JobRuns, data: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody listens at the endpoint; what counts is how the child was started."""
    places = {Place("chat.canary", 1): ModelState(1, LOADED, 0.0)}
    serving_state.write(settings, ServingState({}, True, time.time(), places))
    assert "no API key of its own" in reason(jobs.run("evaluate", name="chat", suite="lm-eval", data=data))
    store_local_api_key(settings, KEY)
    commands = []
    monkeypatch.setattr(
        runner, "run_child", lambda command, *a, **b: commands.append(command) or run_child(command, *a, **b)
    )
    task = Path(data).with_suffix(".yaml")
    Path(data).with_suffix(".jsonl").write_text('{"text": "a", "choices": ["b", "c"], "answer": 0}\n')
    task.write_text(
        "task: t\ndataset_path: json\ndataset_kwargs: {data_files: {test: held-out.jsonl}}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: '{{text}}'\ndoc_to_choice: '{{choices}}'\n"
        "doc_to_target: '{{answer}}'\nmetric_list: [{metric: acc}]\n"
    )
    # It looks for its key before it looks for the endpoint.
    said = reason(jobs.run("evaluate", name="chat", suite="lm-eval", data=str(task)))
    assert f"no endpoint answers at {settings.web_url}" in said
    assert "--model=chat@1" in commands[0] and KEY not in " ".join(commands[0]) + said
