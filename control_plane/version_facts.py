"""What a version folder says about itself, for people: architecture, size, precision, and what its certificate proved.

Reads the small JSON files of a version folder (``triton_backend.config`` and ``exporters.certificate`` say who writes
them). A file or key that is missing leaves its fact None: showing a page must never fail because of one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class VersionFacts:
    """``size_bytes`` is the sum over all files; ``passed`` and what follows come from the certificate's summary, which
    ``certificate`` is.
    """

    architecture: str | None
    precision: str | None
    max_model_len: int | None
    max_num_seqs: int | None
    size_bytes: int | None
    passed: bool | None
    num_tokens_compared: int | None
    max_logit_difference: float | None
    decode_tokens_per_s: float | None
    certificate: Mapping[str, Any]


def read_version_facts(folder: Path) -> VersionFacts:
    document = _read(folder / "model.json")
    model, engine = _object(document, "model"), _object(document, "engine")
    summary = _object(_read(folder / "certificate.json"), "summary")
    files = _object(_read(folder / "manifest.json"), "files")
    sizes = [file.get("size_bytes", 0) for file in files.values() if isinstance(file, dict)]
    return VersionFacts(
        architecture=model.get("architecture"),
        precision=model.get("precision"),
        max_model_len=engine.get("max_model_len"),
        max_num_seqs=engine.get("max_num_seqs"),
        size_bytes=sum(sizes) or None,
        passed=summary.get("passed"),
        num_tokens_compared=summary.get("num_tokens_compared"),
        max_logit_difference=summary.get("max_logit_difference"),
        decode_tokens_per_s=summary.get("decode_tokens_per_s"),
        certificate=summary,
    )


def _read(path: Path) -> Mapping[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def _object(document: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = document.get(key)
    return value if isinstance(value, dict) else {}
