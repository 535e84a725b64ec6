"""Adapters over the API: listed as they lie there, installed by a job, replaced whole, removed; no bad names."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
from sqlalchemy import select
from typer.testing import CliRunner

from control_plane import cli
from control_plane.auth.tables import AuditEvent
from control_plane.client import ApiError
from control_plane.commands import adapters as command
from control_plane.extensions import db
from control_plane.registry import deployments, services
from control_plane.registry.adapters import find_adapters, install_adapter
from tests.unit.control_plane.registry.conftest import sealed
from triton_backend.version_folder import digest, seal

pytestmark = pytest.mark.unit


@pytest.fixture
def chat(app, tmp_path) -> Path:
    """Version 1 is production, version 2 is not served; the adapters' folder."""
    for salt in "ab":
        services.register("chat", sealed(tmp_path / salt, salt))
    deployments.adopt_production("chat", 1)
    return app.config["SETTINGS"].model_repository / "chat" / "adapters"


def write_adapter(folder: Path, base: str, rank: int = 4) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter.json").write_text(json.dumps({"format": 1, "rank": rank, "base": {"digest": base}}))
    (folder / "adapter.safetensors").write_bytes(b"\0" * 1000)
    seal(folder, {}, {})
    return folder


def refused(status: int, said: str, call, *arguments, **options) -> None:
    with pytest.raises(ApiError, match=said) as error:
        call(*arguments, **options)
    assert error.value.status == status


def test_adapters_are_listed_with_the_version_that_each_fits(chat, llmos, tmp_path):
    assert llmos.adapters("chat") == []
    poet = write_adapter(chat / "poet", digest(tmp_path / "b"))
    write_adapter(chat / "stray", "0" * 64)
    (chat / "broken").mkdir()
    (write_adapter(chat / "odd", "") / "adapter.json").write_text("[]")
    (write_adapter(chat / "huge", "") / "adapter.json").write_text('{"rank": 1e999, "base": {"digest": ""}}')
    (chat / ".poet.staged").mkdir()
    (chat / "link").symlink_to(poet)
    found = {adapter["name"]: adapter for adapter in llmos.adapters("chat")}
    assert sorted(found) == ["broken", "huge", "odd", "poet", "stray"]
    assert (found["poet"]["version"], found["poet"]["rank"], found["poet"]["problem"]) == (2, 4, None)
    assert (found["poet"]["digest"], found["poet"]["base_digest"]) == (digest(poet), digest(tmp_path / "b"))
    assert found["poet"]["size_bytes"] > 1000 and found["stray"]["version"] is None
    assert "no manifest.json" in found["broken"]["problem"] and all(
        "cannot be read" in found[name]["problem"] for name in ("odd", "huge")
    )
    refused(404, "model 'nobody' does not exist", llmos.adapters, "nobody")


def test_putting_one_is_a_job_for_the_version_that_is_production_now(chat, llmos):
    job = llmos.put_adapter("chat", "Poet-1", "/adapters/poet")
    assert (job["kind"], job["state"]) == ("adapter", "QUEUED")
    expected = {
        "model": "chat",
        "adapter": "Poet-1",
        "peft_folder": "/adapters/poet",
        "version": 1,
        "other_base": False,
    }
    assert llmos.job(job["id"])["params"] == expected
    assert llmos.put_adapter("chat", "poet", "/p", 2, other_base=True)["params"]["version"] == 2


def test_what_cannot_be_is_refused_before_there_is_a_job(chat, app, llmos, connect, tmp_path):
    for name in (".hidden", "a b", "x" * 129, "-x", "ä"):
        refused(400, "is not allowed", llmos.put_adapter, "chat", name, "/p")
    refused(400, "peft_folder", llmos.put_adapter, "chat", "poet", "")
    refused(400, "peft_folder", llmos.put_adapter, "chat", "poet", "a\0b")
    refused(404, "no version 9", llmos.put_adapter, "chat", "poet", "/p", 9)
    refused(404, "does not exist", llmos.put_adapter, "nobody", "poet", "/p")
    services.register("new", tmp_path / "a")
    refused(409, "no production version; name the version", llmos.put_adapter, "new", "poet", "/p")
    refused(403, "operator", connect("developer").put_adapter, "chat", "poet", "/p")
    assert llmos.jobs() == []


def test_an_adapter_is_removed_and_nothing_else(chat, llmos, tmp_path):
    write_adapter(chat / "poet", "")
    outside = write_adapter(tmp_path / "outside", "")
    (chat / "link").symlink_to(outside)
    for name in ("nobody", "link", "..%2f..", ".lock"):
        refused(404, "no adapter", llmos.delete_adapter, "chat", name)
    llmos.delete_adapter("chat", "poet")
    assert not (chat / "poet").exists() and (outside / "manifest.json").exists()
    refused(404, "no adapter 'poet'", llmos.delete_adapter, "chat", "poet")
    assert db.session.scalars(select(AuditEvent.object_id).where(AuditEvent.action == "adapter.delete")).all() == [
        "chat/poet"
    ]


def test_one_that_has_the_name_is_replaced_whole(app, settings, tmp_path):
    for rank in (4, 8):
        install_adapter(write_adapter(tmp_path / str(rank), "", rank), settings.model_repository, "chat", "poet")
        (found,) = find_adapters(settings.model_repository, "chat")
        assert (found.rank, found.digest) == (rank, digest(tmp_path / str(rank)))
    left = {path.name for path in (settings.model_repository / "chat" / "adapters").iterdir()}
    assert left == {"poet", ".lock"}


def test_the_commands_list_add_and_remove(chat, llmos, tmp_path, monkeypatch):
    write_adapter(chat / "poet", digest(tmp_path / "a"))
    monkeypatch.setattr(command, "connected", lambda: contextlib.nullcontext(llmos))
    monkeypatch.setenv("COLUMNS", "120")

    def run(*arguments: str) -> str:
        shown = CliRunner().invoke(cli.app, ["adapters", *arguments])
        assert shown.exit_code == 0, shown.output
        return shown.output

    assert "poet" in run("list", "chat")
    assert json.loads(run("list", "chat", "--json"))[0]["version"] == 1
    (tmp_path / "cook").mkdir()
    job_id = run("add", "chat", str(tmp_path / "cook"), "--no-wait").split()[-1]
    assert llmos.job(job_id)["params"]["adapter"] == "cook"
    assert llmos.job(job_id)["params"]["peft_folder"] == str(tmp_path / "cook")
    assert "no adapter poet any more" in run("remove", "chat", "poet")
