"""Versions that lie in the model repository without being known: the starter, or folders that somebody put there."""

from __future__ import annotations

import structlog
from sqlalchemy import select

from control_plane.artifacts import ArtifactError, ArtifactStore
from control_plane.errors import Conflict
from control_plane.extensions import db
from control_plane.registry import deployments, services
from control_plane.registry.model_directory import InstalledModel, installed_models
from control_plane.registry.tables import Model, Version
from control_plane.settings import Settings
from triton_backend.version_folder import digest

log = structlog.get_logger(__name__)


def adopt_installed(settings: Settings, store: ArtifactStore, own: str | None = None) -> list[Version]:
    """Store and register installed versions under their own numbers; a model without production gets it as that.

    Only that of digest ``own`` is signed: who put the others there, nobody knows. One that is damaged, cannot be
    stored, or has the number of another version is left out. Returns what is new.
    """
    adopted = []
    for installed in installed_models(settings.model_repository):
        version = _known(installed)
        if version is None:
            try:
                store.put(installed.folder, is_signed=digest(installed.folder) == own)
                version = services.register(installed.name, installed.folder, number=installed.version)
            except (ArtifactError, Conflict) as error:
                # The registry must not keep everything else from starting.
                where = {"model": installed.name, "version": installed.version}
                log.warning("version_not_adopted", **where, reason=str(error))
                continue
            adopted.append(version)
        deployments.adopt_production(installed.name, version.number)
    return adopted


def _known(installed: InstalledModel) -> Version | None:
    query = select(Version).join(Model).where(Model.name == installed.name, Version.digest == digest(installed.folder))
    return db.session.scalar(query)
