"""Tokens that a model's own settings forbid, such as Marian's padding: never chosen, though the model gives them mass.

Settings: https://huggingface.co/docs/transformers/main_classes/text_generation (``bad_words_ids``, ``suppress_tokens``)
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel


def suppressed_tokens(model: PreTrainedModel) -> list[int]:
    """Ids of the tokens that ``generate`` of transformers never chooses, in order."""
    settings: Any = model.generation_config
    if settings is None:
        return []
    words = {words[0] for words in settings.bad_words_ids or () if len(words) == 1}
    return sorted(words.union(settings.suppress_tokens or ()))
