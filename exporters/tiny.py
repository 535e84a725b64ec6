"""Tiny random models of every causal architecture of the installed transformers, for the support matrix and tests.

A config is made from the architecture's own: every size whose name is known is shrunk, and what a few architectures
need besides is written in ``SPECIAL``. Windows and chunks of 8 are shorter than the prompts. Weights are large enough
that greedy tokens vary, and norms, biases and sinks are random too, so that leaving one out shows.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB_SIZE = 320
WEIGHT_STD = 0.2
WINDOW = 8
MAX_WEIGHTS = 100_000_000

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "hidden_size": 64,
    "n_embd": 64,
    "d_model": 64,
    "embedding_size": 64,
    "word_embed_proj_dim": 64,
    "hidden_size_per_layer_input": 16,
    "intermediate_size": 128,
    "ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "encoder_ffn_dim": 128,
    "ffn_hidden_size": 128,
    "dim_ff": 128,
    "n_inner": 128,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "decoder_layers": 2,
    "encoder_layers": 2,
    "num_decoder_layers": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 16,
    "head_size": 16,
    "v_head_dim": 16,
    "attention_head_dim": 16,
    "dim_head": 16,
    "sliding_window": WINDOW,
    "sliding_window_size": WINDOW,
    "attention_chunk_size": WINDOW,
    "max_position_embeddings": 256,
    "n_positions": 256,
    "max_target_positions": 256,
    "max_seq_len": 256,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "moe_top_k": 2,
    "top_k": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "expert_ffn_hidden_size": 32,
    "shared_expert_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "intermediate_size_mlp": 64,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "decoder_sparse_step": 1,
    # latent attention
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    # state spaces
    "state_size": 8,
    "mamba_d_state": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    # what sees images, which text does not need
    "image_size": 32,
    "patch_size": 16,
    "depth": 2,
    "out_hidden_size": 64,
    "num_encoder_layers": 2,
    "encoder_hidden_size": 64,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 2,
}
"""What is shrunk wherever a config has it."""

IS_DECODER = {"is_decoder": True}

LATENT = {"num_key_value_heads": 4}
"""Latent attention gives every query head its own key."""
ATTENTION_HEADS = {"num_key_value_heads": 4, "num_attention_heads": 4}

SPECIAL: dict[str, dict[str, Any]] = {
    "axk1": LATENT,
    "axk2": LATENT,
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "deepseek_v32": LATENT,
    "glm4_moe_lite": LATENT,
    "glm_moe_dsa": LATENT,
    "longcat_flash": LATENT,
    "minicpm3": LATENT,
    "youtu": LATENT,
    "codegen": {"rotary_dim": 16},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 128, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    },
    "gptj": {"rotary_dim": 16},
    "dots1": {"n_shared_experts": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "minimax": {"layer_types": ["linear_attention", "full_attention"]},
    "xmod": {"default_language": "en_XX"},
    "gemma3n_text": {
        "num_kv_shared_layers": 2,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "intermediate_size": [128] * 4,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4_text": {
        "num_kv_shared_layers": 2,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "roc_bert": {"enable_pronunciation": False, "enable_shape": False},
    "dots3_note": LATENT,
    "dots3_note_text": LATENT,
}
"""model_type → what its tiny config needs besides ``SIZES``."""


def architectures() -> list[str]:
    """model_type of every architecture with a causal language model."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(model_type: str, **changes: Any) -> PretrainedConfig:
    config_class = CONFIG_MAPPING[model_type]
    special = {**SPECIAL.get(model_type, {}), **changes}
    config = config_class(**{**_sizes_of(config_class), **special})
    return config


def _sizes_of(config_class: type[PretrainedConfig]) -> dict[str, Any]:
    default = config_class()
    known = set(inspect.signature(config_class.__init__).parameters) | set(vars(default))
    sizes = {name: size for name, size in SIZES.items() if name in known or name in default.attribute_map}
    # One number under two names is given once.
    sizes = {name: size for name, size in sizes.items() if default.attribute_map.get(name) not in sizes}
    if "is_decoder" in known:
        sizes["is_decoder"] = True
    for name, sub_class in default.sub_configs.items():
        if (
            isinstance(sub_class, type)
            and issubclass(sub_class, PretrainedConfig)
            and sub_class is not PretrainedConfig
        ):
            sizes[name] = _sizes_of(sub_class)
    return sizes


def tiny_model(model_type: str, seed: int = 0, **changes: Any) -> Any:
    """A model in fp32, ready to run; the same seed gives the same weights."""
    torch.manual_seed(seed)
    config = tiny_config(model_type, **changes)
    if not hasattr(config, "tie_word_embeddings"):
        config.tie_word_embeddings = False
    with torch.device("meta"):
        num_weights = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if num_weights > MAX_WEIGHTS:
        raise ValueError(f"{num_weights} weights are not tiny; expected at most {MAX_WEIGHTS}")
    model = AutoModelForCausalLM.from_config(config).eval().float()
    randomise(model, seed)
    return model


def randomise(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.empty_like(parameter).normal_(std=WEIGHT_STD, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise)
            else:
                parameter.nan_to_num_().add_(noise)
        for name, buffer in model.named_buffers():
            if "bias" in name and buffer.is_floating_point():
                buffer.copy_(torch.empty_like(buffer).normal_(std=WEIGHT_STD, generator=generator))


def architecture_of(model_type: str) -> str:
    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
