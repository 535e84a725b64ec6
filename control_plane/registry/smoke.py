"""The last look before a version may be served: a few prompts of its certificate, answered as they were then.

The certificate holds the greedy tokens that the version's own engine gave when it was proven. A processor of another
kind may round differently, so what counts is that one answer at least is the same to the last token.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from control_plane.errors import ServingError
from control_plane.registry.places import Place
from control_plane.triton import GenerateCall, TritonClient

MAX_PROMPTS = 3
MAX_TOKENS = 8
TIMEOUT_S = 60.0
GREEDY = {"temperature": 0, "ignore_eos": True, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}


def smoke_test(triton: TritonClient, place: Place, folder: Path) -> None:
    """Raises ServingError if the version at ``place`` gives none of its proven answers; nothing without a proof."""
    proven = _proven_answers(folder)
    found = []
    for prompt_ids, token_ids in proven:
        sampling = {**GREEDY, "max_tokens": len(token_ids)}
        call = GenerateCall(place.model, place.version, input_ids=tuple(prompt_ids), sampling=sampling)
        found.append(list(triton.generate(call, TIMEOUT_S).outputs[0].token_ids))
    if proven and not any(tokens == list(expected) for tokens, (_, expected) in zip(found, proven, strict=True)):
        raise ServingError(
            f"smoke test: {place} answers a prompt of its certificate with tokens {found[0]}; expected {proven[0][1]}"
        )


def _proven_answers(folder: Path) -> list[tuple[Sequence[int], Sequence[int]]]:
    try:
        certificate: dict[str, Any] = json.loads((folder / "certificate.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    results = [result for result in certificate.get("tokens") or () if result.get("token_ids")]
    shortest = sorted(results, key=lambda result: len(result["prompt_ids"]))[:MAX_PROMPTS]
    return [(result["prompt_ids"], result["token_ids"][:MAX_TOKENS]) for result in shortest]
