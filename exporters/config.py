"""What an export is asked to do and what it returns; frozen, checked when built, standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exporters.errors import InvalidConfig

PRECISIONS = ("fp32",)
DEFAULT_MAX_MODEL_LEN = 4096
"""Upper bound of max_model_len when none is asked for: cache memory grows with it."""


@dataclass(frozen=True)
class ExportConfig:
    """One export.

    checkpoint     a local folder in Hugging Face form, or the id of a model on the Hub
    out            the version folder to write; must not exist, or be empty, unless ``overwrite``
    max_model_len  longest prompt + output in tokens; None: the model's own limit, at most 4096
    max_num_seqs   cache rows, so sequences that can run at once
    precision      type of weights and cache
    overwrite      replace ``out`` if it is a version folder
    """

    checkpoint: str
    out: Path
    max_model_len: int | None = None
    max_num_seqs: int = 32
    precision: str = "fp32"
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.max_model_len is not None and self.max_model_len < 2:
            raise InvalidConfig(f"max_model_len has value {self.max_model_len}; expected a whole number ≥ 2")
        if self.max_num_seqs < 1:
            raise InvalidConfig(f"max_num_seqs has value {self.max_num_seqs}; expected a whole number ≥ 1")
        if self.precision not in PRECISIONS:
            raise InvalidConfig(f"precision has value {self.precision!r}; expected one of {', '.join(PRECISIONS)}")


@dataclass(frozen=True)
class ExportedVersion:
    """A sealed version folder. ``digest`` is its identity; ``certificate`` the document in certificate.json.

    A version that was not certified has an empty certificate and ``passed`` None.
    """

    folder: Path
    digest: str
    size_bytes: int
    passed: bool | None
    certificate: Mapping[str, Any] = field(default_factory=dict)
