"""Garbage collection: what somebody needs stays, whatever the registry looks like; what nobody needs goes."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import settings as limits
from hypothesis import strategies as st

from control_plane import create_app
from control_plane.artifacts import artifact_store
from control_plane.extensions import db, now
from control_plane.jobs.tables import CANCELLED, FAILED, QUEUED, RUNNING, SUCCEEDED, Job
from control_plane.registry import deployments, needs
from control_plane.registry.desired import desired_places
from control_plane.registry.garbage import Collector
from control_plane.registry.places import Place
from control_plane.registry.tables import CANARY, IN_PROGRESS, PRODUCTION, Alias, Deployment, Model, Version
from control_plane.settings import PROJECT_ROOT, Settings
from control_plane.triton_fake import FakeTriton, word_by_word
from tests.unit.control_plane.registry.conftest import sealed
from triton_backend.version_folder import digest

pytestmark = pytest.mark.unit
MODELS, NUMBERS, SALTS = ("chat", "code"), (1, 2, 3), tuple("abcdef")
DIRECTORIES = ("chat", "chat.canary", "code", "stranger")
OLD, RECENT = timedelta(days=40), timedelta(days=3)


@dataclass(frozen=True)
class Sealed:
    """Artifacts to choose from: their folders, by digest."""

    folders: dict[str, Path]

    @property
    def digests(self) -> list[str]:
        return list(self.folders)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Sealed:
    folders = [sealed(tmp_path_factory.mktemp("sealed") / salt, salt) for salt in SALTS]
    return Sealed({digest(folder): folder for folder in folders})


@pytest.fixture
def triton() -> FakeTriton:
    return FakeTriton({}, {})


@pytest.fixture
def app(settings: Settings, triton: FakeTriton):
    app = create_app(settings, triton)
    with app.app_context():
        db.create_all()
        yield app


ages = st.sampled_from([None, OLD, RECENT])
versions = st.fixed_dictionaries({"salt": st.integers(0, 5), "retired": ages, "warm": st.booleans()})
registries = st.fixed_dictionaries(
    {
        "versions": st.dictionaries(st.tuples(st.sampled_from(MODELS), st.sampled_from(NUMBERS)), versions, max_size=6),
        "aliases": st.dictionaries(
            st.tuples(st.sampled_from(MODELS), st.sampled_from([PRODUCTION, CANARY, "stable"])),
            st.sampled_from(NUMBERS),
            max_size=4,
        ),
        "deployed": st.sets(st.tuples(st.sampled_from(MODELS), st.sampled_from(NUMBERS)), max_size=2),
        "jobs": st.lists(
            st.tuples(st.sampled_from([QUEUED, RUNNING, FAILED, CANCELLED, SUCCEEDED]), ages, st.integers(0, 5)),
            max_size=3,
        ),
        "checkpoints": st.sets(st.integers(0, 5), max_size=1),
        "stored": st.sets(st.integers(0, 5)),
        "installed": st.sets(
            st.tuples(st.sampled_from(["chat", "chat.canary", "code", "stranger"]), st.sampled_from(NUMBERS)),
            max_size=6,
        ),
        "loaded": st.sets(st.tuples(st.sampled_from(["chat", "chat.canary"]), st.sampled_from(NUMBERS)), max_size=2),
    }
)


def clear(settings: Settings, triton: FakeTriton) -> None:
    for folder in (settings.home / "artifacts", settings.model_repository, settings.checkpoints_dir):
        shutil.rmtree(folder, ignore_errors=True)
    for table in (Job, Deployment, Alias, Version, Model):
        db.session.query(table).delete()
    db.session.commit()
    triton.models.clear()
    triton.versions.clear()


def build(registry: dict[str, Any], artifacts: Sealed, settings: Settings, triton: FakeTriton) -> None:
    clear(settings, triton)
    rows: dict[tuple[str, int], Version] = {}
    models = {name: Model(name=name, created_by="test") for name in MODELS}
    db.session.add_all(models.values())
    for (name, number), facts in registry["versions"].items():
        found = artifacts.digests[facts["salt"]]
        retired_at = facts["retired"] and now() - facts["retired"]
        warm = now() + RECENT if facts["warm"] else None
        rows[name, number] = Version(
            model=models[name], number=number, digest=found, created_by="test", retired_at=retired_at, warm_until=warm
        )
    db.session.add_all(rows.values())
    db.session.flush()
    for (name, alias), number in registry["aliases"].items():
        if (name, number) in rows:
            db.session.add(Alias(model=models[name], name=alias, version=rows[name, number]))
    for key in registry["deployed"] & rows.keys():
        kind = {"kind": "promote", "alias": PRODUCTION, "state": IN_PROGRESS, "created_by": "test"}
        db.session.add(Deployment(model=models[key[0]], version=rows[key], overridden=[], **kind))
    for state, age, salt in registry["jobs"]:
        steps = {"export": {"digest": artifacts.digests[salt]}}
        finished_at = None if state in (QUEUED, RUNNING) else now() - (age or timedelta())
        row = {"params": {}, "queue": "cpu", "created_by": "test", "steps": steps, "finished_at": finished_at}
        db.session.add(Job(kind="publish", state=state, **row))
    db.session.commit()
    for salt in registry["stored"]:
        artifact_store(settings).put(artifacts.folders[artifacts.digests[salt]])
    for salt in registry["checkpoints"]:
        shutil.copytree(artifacts.folders[artifacts.digests[salt]], settings.checkpoints_dir / "tiny")
    for model, number in registry["installed"]:
        facts = registry["versions"].get((model.removesuffix(".canary"), number))
        folder = artifacts.folders[artifacts.digests[facts["salt"] if facts else 0]]
        shutil.copytree(folder, settings.model_repository / model / str(number))
    for model, number in registry["loaded"]:
        triton.models[model] = word_by_word
        triton.versions.setdefault(model, []).append(number)


def needed_digests(registry: dict[str, Any], artifacts: Sealed) -> set[int]:
    """Said anew, in the plainest words: which of the artifacts somebody needs."""
    needed = set(registry["checkpoints"])
    for key, facts in registry["versions"].items():
        is_gone = facts["retired"] == OLD
        is_aliased = any(name == key[0] and number == key[1] for (name, _), number in registry["aliases"].items())
        if not is_gone or facts["warm"] or is_aliased or key in registry["deployed"]:
            needed.add(facts["salt"])
    for state, age, salt in registry["jobs"]:
        if state in (QUEUED, RUNNING) or (state in (FAILED, CANCELLED) and age != OLD):
            needed.add(salt)
    return needed


EMPTY = {"versions": {}, "aliases": {}, "deployed": set(), "jobs": [], "checkpoints": set()}
RETIRED_WHILE_DEPLOYED = {
    **EMPTY,
    "versions": {("chat", 1): {"salt": 0, "retired": OLD, "warm": False}},
    "deployed": {("chat", 1)},
    "stored": {0, 1},
    "installed": {("chat.canary", 1)},
    "loaded": set(),
}


@example(registry=RETIRED_WHILE_DEPLOYED)
@limits(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(registry=registries)
def test_what_somebody_needs_stays_and_everything_else_goes(registry, app, settings, triton, artifacts):
    build(registry, artifacts, settings, triton)
    store = artifact_store(settings)
    collector = Collector(settings, store, triton)
    loaded = {Place(*key) for key in registry["loaded"]}
    desired = {place for intent in deployments.intents() for place in desired_places(intent, loaded)}
    installed = {Place(*key) for key in registry["installed"]}
    in_store = {artifacts.digests[salt] for salt in registry["stored"]}
    found = collector.find()
    assert in_store == set(store.digests())  # Looking changes nothing.
    for item in found:
        assert collector.remove(item)
    needed = {artifacts.digests[salt] for salt in needed_digests(registry, artifacts)}
    assert set(store.digests()) == in_store & needed
    left = {place for place in installed if (settings.model_repository / place.model / str(place.version)).exists()}
    assert left >= installed & (loaded | desired)
    assert left >= {place for place in installed if place.model == "stranger"}
    for place in installed - left:
        facts = registry["versions"][place.model.removesuffix(".canary"), place.version]
        assert facts["retired"] or artifacts.digests[facts["salt"]] in in_store
    assert collector.find() == []


def test_an_artifact_that_is_needed_meanwhile_is_kept(app, settings, triton, artifacts):
    store = artifact_store(settings)
    found = store.put(artifacts.folders[artifacts.digests[0]])
    collector = Collector(settings, store, triton)
    (item,) = collector.find()
    model = Model(name="chat", created_by="test")
    db.session.add(Version(model=model, number=1, digest=found, created_by="test"))
    db.session.commit()
    assert not collector.remove(item) and store.has(found)


@pytest.fixture
def version_one(app, settings, artifacts) -> Version:
    """Version 1 of ``chat`` is stored, registered and installed as ``chat.canary/1``; nobody wants it loaded."""
    folder = artifacts.folders[artifacts.digests[0]]
    artifact_store(settings).put(folder)
    shutil.copytree(folder, settings.model_repository / "chat.canary" / "1")
    version = Version(model=Model(name="chat", created_by="t"), number=1, digest=digest(folder), created_by="t")
    db.session.add(version)
    db.session.commit()
    return version


def test_while_triton_is_away_nothing_installed_is_removed(settings, triton, version_one):
    collector = Collector(settings, artifact_store(settings), triton)
    assert [(each.kind, each.name) for each in collector.find()] == [("installed", "chat.canary/1")]
    triton.is_running = False
    assert collector.find() == []


def test_an_installed_version_that_a_job_reads_or_that_is_wanted_meanwhile_stays(settings, triton, version_one):
    collector = Collector(settings, artifact_store(settings), triton)
    (item,) = collector.find()
    job = Job(kind="evaluate", params={}, queue="cpu", state=RUNNING, created_by="t")
    job.steps = {"find": {"model": "chat", "version": 1, "digest": version_one.digest}}
    db.session.add(job)
    db.session.commit()
    assert collector.find() == [] and not collector.remove(item)
    job.steps, job.params = {}, {"folder": f"model_repository/../{settings.home}/versions/x"}
    db.session.commit()
    assert needs.jobs(settings)[0].names(str(PROJECT_ROOT / job.params["folder"]))
    job.state = SUCCEEDED
    db.session.add(Alias(model=version_one.model, name=CANARY, version=version_one, weight=0.0))
    db.session.commit()
    assert collector.find() == [] and not collector.remove(item)


def test_an_installed_version_that_was_changed_or_is_not_in_the_store_is_left_alone(settings, triton, version_one):
    collector = Collector(settings, artifact_store(settings), triton)
    artifact_store(settings).delete(version_one.digest)
    assert collector.find() == []
    artifact_store(settings).put(settings.model_repository / "chat.canary" / "1")
    (settings.model_repository / "chat.canary" / "1" / "manifest.json").write_text("{}")
    assert collector.find() == []


def aged(folder: Path, seconds: float) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    os.utime(folder, (time.time() - seconds,) * 2)
    return folder


def test_old_exports_of_jobs_go_unless_a_job_names_them(app, settings, triton):
    old, recent, named = (settings.versions_dir / "chat" / (digit * 32) for digit in "abc")
    own = settings.versions_dir / "chat" / "7"
    for folder in (old, named, own):
        aged(folder, 40 * 86400)
    aged(recent, 3 * 86400)
    params = {"folder": f"{named}/"}
    db.session.add(Job(kind="verify", params=params, queue="cpu", state=QUEUED, created_by="t"))
    db.session.commit()
    collector = Collector(settings, artifact_store(settings), triton)
    assert [(each.kind, each.name) for each in collector.find()] == [("export", str(old))]
    assert collector.remove(*collector.find())
    assert sorted(settings.versions_dir.glob("chat/*")) == sorted((recent, named, own))


def test_leftovers_go_once_their_process_is_long_dead(app, settings, triton):
    dead = 4_194_304  # One more than Linux gives to a process.
    directory = settings.model_repository / "chat"
    gone = [directory / f".3.{what}-{dead}" for what in ("staged", "removed", "fetched")]
    gone.append(settings.checkpoints_dir / f".tiny.fetched-{dead}")
    kept = [directory / f".3.staged-{os.getpid()}", directory / "adapters", directory / ".hidden"]
    for folder in (*gone, *kept):
        aged(folder, 2 * 3600)
    kept.append(aged(directory / f".4.staged-{dead}", 60))
    collector = Collector(settings, artifact_store(settings), triton)
    found = collector.find()
    assert sorted(each.name for each in found) == sorted(map(str, gone))
    assert all(map(collector.remove, found)) and not any(folder.exists() for folder in gone)
    assert all(folder.exists() for folder in kept)


def test_the_api_lists_artifacts_with_who_needs_them_page_by_page(settings, version_one, connect, artifacts, triton):
    store = artifact_store(settings)
    other = store.put(artifacts.folders[artifacts.digests[1]])
    viewer = connect("viewer")
    found = {each["digest"]: each for each in viewer.artifacts()}
    assert found.keys() == {version_one.digest, other} and list(found) == sorted(found)
    assert found[version_one.digest]["used_by"] == ["chat/1"] and found[other]["used_by"] == []
    assert found[other]["kind"] == "version" and found[other]["size_bytes"] > 0
    first = viewer._ask("GET", "/api/v1/artifacts", params={"limit": 1})
    assert first["has_more"] and first["data"][0]["digest"] == min(found)
    (Path(settings.artifacts_url) / other / "manifest.json").write_text("{")
    assert {each["kind"] for each in viewer.artifacts()} == {"version", "damaged"}
