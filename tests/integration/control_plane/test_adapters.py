"""An adapter as PEFT saved it, installed by its job for a version with slots: what the engine then opens and reads."""

from __future__ import annotations

import json

import pytest

from control_plane import create_app, upgrade_database
from control_plane.artifacts import artifact_store
from control_plane.jobs import runner
from control_plane.jobs.tables import FAILED, SUCCEEDED
from control_plane.registry import deployments, services
from control_plane.registry.adapters import find_adapters
from control_plane.registry.model_directory import ensure_installed
from control_plane.registry.places import Place
from control_plane.triton_fake import FakeTriton
from exporters import ExportConfig, export
from tests.integration.exporters.conftest import make_checkpoint, make_model, tokenizer  # noqa: F401
from tests.integration.exporters.test_lora import adapt
from triton_backend.adapter_store import AdapterStore
from triton_backend.version_folder import digest

from .running_jobs import Jobs

pytestmark = pytest.mark.integration
TARGETS = ("q_proj", "v_proj")


@pytest.fixture(scope="module")
def version(make_checkpoint, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("exported") / "1"
    slots = {"lora_slots": 1, "lora_rank": 4, "lora_targets": TARGETS}
    export(ExportConfig(str(make_checkpoint("llama")), folder, max_model_len=48, **slots), certify=False)
    return folder


@pytest.fixture
def app(settings, version):
    """Version 1 of ``chat`` is in the store and production, but not installed. No Redis, no worker."""
    upgrade_database(settings)
    app = create_app(settings, FakeTriton({}))
    with app.app_context():
        artifact_store(settings).put(version)
        services.register("chat", version)
        deployments.adopt_production("chat", 1)
    return app


@pytest.mark.parametrize("is_installed", [False, True])
def test_an_adapter_is_converted_installed_and_what_the_engine_reads(app, settings, version, tmp_path, is_installed):
    if is_installed:
        ensure_installed(settings.model_repository, artifact_store(settings), Place("chat", 1), digest(version))
    _, (poet,) = adapt(make_model("llama"), tmp_path / "peft", TARGETS, [2])
    jobs = Jobs(app)
    job_id = jobs.submit("adapter", {"model": "chat", "adapter": "verse", "peft_folder": str(poet)})
    assert runner.run_next(app, "cpu") == job_id
    job = jobs.get(job_id)
    assert job.state == SUCCEEDED, job.error
    (found,) = find_adapters(settings.model_repository, "chat")
    assert (found.name, found.rank, found.base_digest, found.problem) == ("verse", 2, digest(version), None)
    assert job.result == {"version": 1, "digest": found.digest, "model": "chat", "adapter": "verse"}
    store = AdapterStore(settings.model_repository / "chat" / "adapters", digest(version))
    assert store.names() == ["verse"]
    assert len(store.read(store.open("verse"))) == 2 * 2 * len(TARGETS), "a and b, per target, in two layers"


def test_what_is_no_adapter_fails_with_the_reason_and_installs_nothing(app, settings, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    jobs = Jobs(app)
    for folder, said in ((tmp_path, "adapter_model.safetensors"), (tmp_path / "nothing", "no adapter_config.json")):
        job_id = jobs.submit("adapter", {"model": "chat", "adapter": "verse", "peft_folder": str(folder)})
        runner.run_next(app, "cpu")
        job = jobs.get(job_id)
        assert job.state == FAILED and said in job.error, job.error
    assert find_adapters(settings.model_repository, "chat") == []
