"""What a checkpoint asks of ``generate`` of transformers: tokens that are never chosen, defaults of requests, and what
the engine does not do. Read from where transformers reads it; the engine's names and ranges are ``sampling_params``'.

Settings: https://huggingface.co/docs/transformers/main_classes/text_generation
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from exporters.checkpoint import Checkpoint
from exporters.errors import InvalidCheckpoint, reason_of
from triton_backend.errors import InvalidRequest
from triton_backend.sampling_params import FIELDS

DEFAULTS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "typical_p": "typical_p",
    "repetition_penalty": "repetition_penalty",
    "no_repeat_ngram_size": "no_repeat_ngram_size",
    "num_beams": "beam_width",
    "length_penalty": "length_penalty",
    "early_stopping": "early_stopping",
}
"""Settings that become defaults of requests, with the engine's names."""
IGNORED: dict[str, tuple[Any, ...]] = {
    "begin_suppress_tokens": ([],),
    "constraints": ([],),
    "diversity_penalty": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": ([],),
    "guidance_scale": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "num_beam_groups": (1,),
    "penalty_alpha": (0,),
    "sequence_bias": ({}, []),
    "stop_strings": ([], ""),
    "top_h": (),
    "watermarking_config": (),
}
"""Settings that the engine does not take over, with the values besides None that ask for nothing.

Requests can ask for some of them, such as ``min_tokens``; as a default it would make every shorter request invalid.
"""


def load_generation_config(checkpoint: Checkpoint) -> GenerationConfig:
    """As transformers loads it with a model; raises InvalidCheckpoint."""
    name = file_name(checkpoint)
    try:
        return GenerationConfig.from_pretrained(
            checkpoint.folder,
            config_file_name=name,
            local_files_only=True,
            _from_model_config=name == "config.json",
        )
    except Exception as error:  # whatever a value of the wrong type leads to
        raise InvalidCheckpoint(
            f"transformers cannot read the generation settings in {checkpoint.folder / name} ({reason_of(error)}); "
            "correct them or remove them"
        ) from error


def file_name(checkpoint: Checkpoint) -> str:
    """Where the settings are: old checkpoints have them in config.json."""
    has_own = (checkpoint.folder / "generation_config.json").is_file()
    return "generation_config.json" if has_own else "config.json"


def generation_defaults(settings: Any, checkpoint: Checkpoint) -> dict[str, Any]:
    """Defaults of requests, by the engine's names; raises InvalidCheckpoint for one that the engine would refuse."""
    found: dict[str, Any] = {}
    for name, engine_name in DEFAULTS.items():
        if (value := getattr(settings, name, None)) is None:
            continue
        if name == "early_stopping" and value in (0, 1):  # as transformers takes it
            value = bool(value)
        try:
            found[engine_name] = FIELDS[engine_name].parse(name, value)
        except InvalidRequest as error:
            path = checkpoint.folder / file_name(checkpoint)
            raise InvalidCheckpoint(f"{path}: {error.args[0]}; correct it or remove it") from None
    return found


def suppressed_tokens(model: PreTrainedModel) -> list[int]:
    """Ids of the tokens that ``generate`` of transformers never chooses, in order; raises InvalidCheckpoint.

    Such as Marian's padding, which the model gives mass. An end of sequence can be suppressed, but be no bad word.
    """
    settings: Any = model.generation_config
    if settings is None:
        return []
    ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    words = {words[0] for words in _bad_words(settings) if len(words) == 1}
    found = words.difference(ends).union(_token_ids("suppress_tokens", settings.suppress_tokens or ()))
    if not found:
        return []
    vocab_size = model.get_output_embeddings().weight.shape[0]
    return sorted(token_id for token_id in found if 0 <= token_id < vocab_size)


def ignored_settings(settings: Any) -> dict[str, Any]:
    """Settings that would change what is generated, and that the engine does not take over, by name."""
    found = {
        name: value.to_dict() if hasattr(value, "to_dict") else value
        for name, neutral in IGNORED.items()
        if (value := getattr(settings, name, None)) is not None and value not in neutral
    }
    if phrases := [words for words in _bad_words(settings) if len(words) > 1]:
        found["bad_words_ids"] = phrases
    return found


def _bad_words(settings: Any) -> list[list[int]]:
    words = getattr(settings, "bad_words_ids", None) or []
    if not isinstance(words, list) or not all(isinstance(ids, list) and ids for ids in words):
        raise InvalidCheckpoint(
            f"the generation settings have bad_words_ids {words!r}; expected a list of lists of token ids"
        )
    return [list(_token_ids("bad_words_ids", ids)) for ids in words]


def _token_ids(name: str, ids: Any) -> Iterable[int]:
    if not isinstance(ids, list | tuple) or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise InvalidCheckpoint(f"the generation settings have {name} {ids!r}; expected token ids")
    return ids
