"""The original: a checkpoint loaded in PyTorch by transformers, in fp32, with transformers' own attention.

It is what is traced, and what the exported version is later compared with. Refuses what cannot be exported before
time is spent on it, and what only loading shows: weights that do not fit the config, or are not finite.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
)

from exporters import torch_transformer
from exporters.checkpoint import Checkpoint
from exporters.errors import InvalidCheckpoint, UnsupportedArchitecture, reason_of
from exporters.seq2seq import num_layers

SAFE_LOADING: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
CAUSAL_ARCHITECTURES = frozenset(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
"""Classes of causal language models, of which some have names of their own."""


def kind_of(config: PretrainedConfig) -> str:
    """``decoder``, ``encoder_decoder`` or ``encoder``: what a config describes (``ModelConfig.kind``).

    Some types are both, such as BERT, which can be told to be causal; then the class that wrote the checkpoint decides.
    """
    if config.is_encoder_decoder:
        return "encoder_decoder"
    if any(_is_causal(name) for name in config.architectures or ()):
        return "decoder"
    is_encoder = type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or type(config) in MODEL_FOR_MASKED_LM_MAPPING
    return "encoder" if is_encoder else "decoder"


def _is_causal(architecture: str) -> bool:
    return architecture.endswith(("ForCausalLM", "LMHeadModel")) or architecture in CAUSAL_ARCHITECTURES


def read_config(checkpoint: Checkpoint) -> PretrainedConfig:
    """The checkpoint's config, whatever kind of model it describes."""
    torch_transformer.register()
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(checkpoint.folder, **SAFE_LOADING)
    except Exception as error:  # huggingface_hub's errors of a field share no base class with transformers' own
        kind = InvalidCheckpoint if checkpoint.model_type in CONFIG_MAPPING else UnsupportedArchitecture
        raise kind(
            f"transformers cannot read {checkpoint.folder / 'config.json'} with model_type {checkpoint.model_type!r}: "
            f"{reason_of(error)}"
        ) from error
    return config


def load_config(checkpoint: Checkpoint) -> PretrainedConfig:
    """The checkpoint's config; raises UnsupportedArchitecture if it is not that of a decoder."""
    config = read_config(checkpoint)
    if config.is_encoder_decoder:
        raise UnsupportedArchitecture(
            f"model_type {checkpoint.model_type!r} is an encoder-decoder model; expected a decoder-only causal model"
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedArchitecture(
            f"model_type {checkpoint.model_type!r} has no causal language model in transformers; expected one of the "
            "decoder-only text models, such as llama or qwen2"
        )
    return config


def load_seq2seq_config(checkpoint: Checkpoint) -> PretrainedConfig:
    """The checkpoint's config; raises UnsupportedArchitecture if it is not that of an encoder–decoder for text."""
    config = read_config(checkpoint)
    if not config.is_encoder_decoder or type(config) not in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        raise UnsupportedArchitecture(
            f"model_type {checkpoint.model_type!r} has no encoder-decoder language model in transformers; expected one "
            "of the text-to-text models, such as bart or t5"
        )
    return config


def load_model(checkpoint: Checkpoint) -> PreTrainedModel:
    """The checkpoint's decoder in fp32, ready to run; raises ExportError with the reason if it cannot be exported."""
    return _load(checkpoint, load_config(checkpoint), AutoModelForCausalLM)


def load_seq2seq_model(checkpoint: Checkpoint) -> PreTrainedModel:
    """The checkpoint's encoder–decoder in fp32, ready to run; raises ExportError with the reason if it cannot be
    exported.
    """
    return _load(checkpoint, load_seq2seq_config(checkpoint), AutoModelForSeq2SeqLM)


def _load(checkpoint: Checkpoint, config: PretrainedConfig, auto_class: Any) -> PreTrainedModel:
    try:
        loaded: Any = auto_class.from_pretrained(
            checkpoint.folder,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            # Reported below by name, instead of by the first one only.
            ignore_mismatched_sizes=True,
            **SAFE_LOADING,
        )
    except Exception as error:  # whatever a bad value of config.json leads to
        raise InvalidCheckpoint(f"transformers cannot load {checkpoint.folder}: {reason_of(error)}") from error
    model, info = loaded
    _check_weights_fit(checkpoint, info, _num_layers(model))
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise InvalidCheckpoint(
                f"weight {name} has NaN or infinite values; expected finite numbers: the training that wrote "
                "it diverged or the file is damaged, use an earlier checkpoint"
            )
    loaded_model: PreTrainedModel = model.eval()
    return loaded_model


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    try:
        return AutoTokenizer.from_pretrained(checkpoint.folder, **SAFE_LOADING)
    except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
        raise InvalidCheckpoint(
            f"transformers cannot load the tokenizer of {checkpoint.folder}: {reason_of(error)}; save it "
            "again with AutoTokenizer.save_pretrained"
        ) from error


def _check_weights_fit(checkpoint: Checkpoint, info: dict[str, Any], num_layers: int) -> None:
    missing = sorted(info["missing_keys"])
    # Other unexpected weights are harmless leftovers of old transformers, which it ignores as well.
    extra_layers = sorted(name for name in info["unexpected_keys"] if _layer_in(name) >= num_layers)
    mismatched = sorted(info["mismatched_keys"])
    if mismatched:
        name, found, expected = mismatched[0][:3]
        raise InvalidCheckpoint(
            f"weight {name} has shape {list(found)} in {checkpoint.folder}; its config.json expects {list(expected)} "
            f"({len(mismatched)} such weights): use the config.json that belongs to these weights"
        )
    if extra_layers:
        raise InvalidCheckpoint(
            f"{checkpoint.folder} holds {extra_layers[0]}, but its config.json has {num_layers} layers; "
            "use the config.json that belongs to these weights"
        )
    if missing:
        raise InvalidCheckpoint(
            f"{checkpoint.folder} lacks {len(missing)} weights that its config.json expects: "
            f"{', '.join(missing[:5])}{', …' if len(missing) > 5 else ''}; use the config.json that belongs to these "
            "weights, or download the checkpoint again"
        )


def _num_layers(model: PreTrainedModel) -> int:
    """Layers of a decoder, or of the longer of an encoder and a decoder."""
    if not model.config.is_encoder_decoder:
        return int(model.config.get_text_config().num_hidden_layers)
    return max(num_layers(model.get_encoder()), num_layers(model.get_decoder()))


def _layer_in(weight: str) -> int:
    number = re.search(r"\.(\d+)\.", weight)
    return int(number[1]) if number else -1
