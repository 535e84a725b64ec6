"""Where a version is served: a Triton model and a version number in it.

    production is 3      chat          …, 1, 2, 3       up to production: an unversioned request reaches the highest
                         chat.canary   4, 5, …          what is newer: reached only by those who name the version

Triton answers an unversioned request with the highest loaded version of a model. So ``chat`` holds nothing above
production; candidates, and versions that were rolled back from, live in ``chat.canary``.
"""

from __future__ import annotations

from typing import NamedTuple

CANARY_SUFFIX = ".canary"


class Place(NamedTuple):
    """``model`` is the name of the model in Triton."""

    model: str
    version: int

    def __str__(self) -> str:
        return f"{self.model}/{self.version}"

    @classmethod
    def parse(cls, text: str) -> Place:
        """The inverse of ``str``."""
        model, _, version = text.rpartition("/")
        return cls(model, int(version))


def proper_place(name: str, number: int, production: int | None) -> Place:
    """Where version ``number`` of model ``name`` belongs while ``production`` is the production version."""
    is_above = production is None or number > production
    return Place(name + CANARY_SUFFIX if is_above else name, number)


def possible_places(name: str, number: int) -> tuple[Place, Place]:
    return Place(name, number), Place(name + CANARY_SUFFIX, number)


def model_of(place: Place) -> str:
    """The registry's name of the model that is served at ``place``."""
    return place.model.removesuffix(CANARY_SUFFIX)
