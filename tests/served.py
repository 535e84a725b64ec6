"""A served model for tests without a reconciler: the rows and the serving.json that it would have made."""

from __future__ import annotations

import time

from sqlalchemy import select

from control_plane.extensions import db
from control_plane.registry import serving_state
from control_plane.registry.places import Place
from control_plane.registry.serving_state import LOADED, ModelState, ServingState
from control_plane.registry.tables import PRODUCTION, Alias, Model, Version
from control_plane.settings import Settings


def serve(name: str, number: int = 1) -> None:
    """Make a version, of which there is no more than a row, production. Needs an application context."""
    if db.session.scalar(select(Model.id).where(Model.name == name)) is not None:
        return
    model = Model(name=name, created_by="test")
    version = Version(model=model, number=number, digest="0" * 64, passed=True, created_by="test")
    db.session.add(Alias(model=model, name=PRODUCTION, version=version))
    db.session.commit()


def say_loaded(settings: Settings, *places: Place) -> None:
    """What the reconciler writes when these versions are loaded, the last of them as production."""
    states = {place: ModelState(place.version, LOADED, 0.0) for place in places}
    models = {place.model: states[place] for place in places}
    serving_state.write(settings, ServingState(models, True, time.time(), states))
