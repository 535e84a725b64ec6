"""Installed versions that nobody registered are taken in, under their number, and served."""

from __future__ import annotations

import pytest

from control_plane.artifacts import ArtifactStore
from control_plane.errors import Conflict
from control_plane.registry import deployments, services
from control_plane.registry.adoption import adopt_installed
from tests.unit.control_plane.registry.conftest import sealed
from triton_backend.version_folder import digest

pytestmark = pytest.mark.unit


def test_installed_versions_are_stored_and_registered_once_under_their_number(app, settings, tmp_path):
    sealed(settings.model_repository / "starter" / "3", "s")
    (settings.model_repository / "starter" / "config.pbtxt").write_text("")
    store = ArtifactStore(str(tmp_path / "store"))
    (adopted,) = adopt_installed(settings, store)
    assert (adopted.model.name, adopted.number) == ("starter", 3)
    assert store.digests() == [adopted.digest]
    assert deployments.served_models() == ["starter"]
    assert adopt_installed(settings, store) == []
    assert services.register("starter", sealed(tmp_path / "b", "b")).number == 4


def test_only_what_was_made_here_is_signed(app, settings, tmp_path):
    signed = {}

    class Store(ArtifactStore):
        def put(self, folder, *, is_signed=True):
            signed[folder.parent.name] = is_signed
            return super().put(folder, is_signed=is_signed)

    for name in ("starter", "stranger"):
        (sealed(settings.model_repository / name / "1", name).parent / "config.pbtxt").write_text("")
    adopt_installed(settings, Store(str(tmp_path / "store")), digest(settings.model_repository / "starter" / "1"))
    assert signed == {"starter": True, "stranger": False}


def test_a_damaged_installed_version_is_left_out(app, settings, tmp_path):
    folder = sealed(settings.model_repository / "starter" / "3", "s")
    (folder.parent / "config.pbtxt").write_text("")
    (folder / "model.json").write_text("changed")
    assert adopt_installed(settings, ArtifactStore(str(tmp_path / "store"))) == []
    assert services.find_models(None, None, 10) == []


def test_an_installed_version_whose_number_is_taken_is_left_out(app, settings, tmp_path):
    services.register("starter", sealed(tmp_path / "published", "p"))
    sealed(settings.model_repository / "starter" / "1", "s")
    (settings.model_repository / "starter" / "config.pbtxt").write_text("")
    assert adopt_installed(settings, ArtifactStore(str(tmp_path / "store"))) == []
    assert [version.number for version in services.find_versions("starter", None, 10)] == [1]
    with pytest.raises(Conflict, match="has another version 1"):
        services.register("starter", settings.model_repository / "starter" / "1", number=1)


def test_an_installed_version_beside_production_is_registered_and_not_served(app, settings, tmp_path):
    services.register("starter", sealed(tmp_path / "a", "a"))
    deployments.adopt_production("starter", 1)
    sealed(settings.model_repository / "starter" / "2", "b")
    (settings.model_repository / "starter" / "config.pbtxt").write_text("")
    (adopted,) = adopt_installed(settings, ArtifactStore(str(tmp_path / "store")))
    (intent,) = deployments.intents()
    assert (adopted.number, intent.production, list(intent.wanted)) == (2, 1, [1])
