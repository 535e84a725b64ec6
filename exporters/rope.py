"""Rotary embeddings whose frequencies depend on how long the sequence is.

``dynamic`` and ``longrope`` scaling change every frequency once the longest sequence of a batch passes a limit. A
cache keeps keys that were rotated with the old ones, and batch-mates would change each other's tokens, so such a model
is exported for lengths up to that limit only, where the frequencies are constant.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PretrainedConfig


def constant_frequency_limit(config: PretrainedConfig) -> int | None:
    """Longest sequence, in tokens, for which all frequencies, and scales of queries, are constant; None if they always
    are.
    """
    parameters: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    # Either one set of parameters, or one per kind of layer.
    sets = [parameters] if "rope_type" in parameters else [p for p in parameters.values() if isinstance(p, dict)]
    limits = []
    for rope in sets:
        if rope.get("rope_type") == "longrope":
            limits.append(int(rope.get("original_max_position_embeddings") or config.max_position_embeddings))
        elif "dynamic" in str(rope.get("rope_type")):
            limits.append(int(config.max_position_embeddings))
    if getattr(config, "attn_temperature_tuning", False):
        # Llama 4 scales queries further on by their place in the input, not by the positions that it is told.
        limits.append(int(config.floor_scale) - 1)
    return min(limits, default=None)


@contextmanager
def constant_frequencies(model: torch.nn.Module) -> Iterator[None]:
    """While open, ``model`` does not look at lengths to choose frequencies, so that it can be traced."""
    changed: list[tuple[Any, Any]] = []
    try:
        for module in model.modules():
            rope_type: Any = getattr(module, "rope_type", None)
            if isinstance(rope_type, str) and _depends_on_length(rope_type):
                changed.append((module, rope_type))
                module.rope_type = "default"  # type: ignore[assignment]
            elif isinstance(rope_type, dict) and any(map(_depends_on_length, rope_type.values())):
                changed.append((module, rope_type))
                module.rope_type = dict.fromkeys(rope_type, "default")  # type: ignore[assignment]
        yield
    finally:
        for module, rope_type in changed:
            module.rope_type = rope_type


def _depends_on_length(rope_type: str) -> bool:
    return rope_type == "longrope" or "dynamic" in rope_type
