"""Kinds of parameters that jobs of several domains have: texts, names of models and of settings."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from control_plane.registry.model_directory import NAME
from control_plane.registry.places import CANARY_SUFFIX

MAX_TEXT = 1000


def _no_nul(text: str) -> str:
    if "\0" in text:
        raise ValueError("expected a text without NUL characters")
    return text


def _not_a_canary(name: str) -> str:
    if name.endswith(CANARY_SUFFIX):
        raise ValueError(f"expected a name that does not end in {CANARY_SUFFIX!r}: so canaries are served")
    return name


Text = Annotated[str, Field(min_length=1, max_length=MAX_TEXT), AfterValidator(_no_nul)]
ModelName = Annotated[str, Field(pattern=f"^{NAME.pattern}$"), AfterValidator(_not_a_canary)]
SettingName = Annotated[str, Field(pattern="^[a-z_][a-z0-9_]{0,63}$")]
