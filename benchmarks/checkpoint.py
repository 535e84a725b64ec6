"""The model that every engine is measured with: a Llama of 135 M parameters whose weights come from a seed.

The shape is that of SmolLM-135M; beam search is measured with one of T5-small's as well. Random weights take as long to
multiply as trained ones, are the same wherever this runs, and are nobody's to license. ``make`` writes a checkpoint in
Hugging Face form, tokenizer included, and keeps it; ``python -m benchmarks.checkpoint FOLDER`` does that in a process
that gives PyTorch's memory back.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CONFIG: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    # Twice the usual: with it, greedy text hardly repeats itself, so that one wrong position shows in the tokens.
    "initializer_range": 0.04,
}
# The shape of T5-small.
SEQ2SEQ_CONFIG: dict[str, Any] = {
    "vocab_size": 32128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_heads": 8,
    "max_position_embeddings": 512,
    "decoder_start_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 2,
    # With it, and smaller embeddings, text depends on its source; twice as much, and fp32 is too coarse to compare.
    "initializer_factor": 1.5,
}
EMBEDDING_SCALE = 0.1
SEED = 0
SPECIAL_TOKENS = ("<s>", "</s>", "<pad>")


def name(config: Mapping[str, Any] = CONFIG) -> str:
    """Of the checkpoint's folder; another shape or seed gets another one."""
    kind = "t5" if "d_model" in config else "llama"
    return f"{kind}-{hashlib.sha256(json.dumps([SEED, dict(config)]).encode()).hexdigest()[:8]}"


def make(folder: Path, config: Mapping[str, Any] = CONFIG) -> Path:
    """Write the checkpoint to ``folder`` unless it is there already; config.json is written last."""
    if (folder / "config.json").exists():
        return folder
    import torch

    torch.manual_seed(SEED)
    model = _model(config)
    with torch.no_grad():
        # A logit of 0 is never the largest of so many, so no text ends by itself in any engine.
        model.get_input_embeddings().weight[config["eos_token_id"]] = 0.0
    folder.mkdir(parents=True, exist_ok=True)
    _tokenizer(config["vocab_size"]).save_pretrained(folder)
    staged = folder / "staged"
    model.save_pretrained(staged)
    for name in ("generation_config.json", "model.safetensors", "config.json"):
        (staged / name).rename(folder / name)
    staged.rmdir()
    return folder


def _model(config: Mapping[str, Any]) -> Any:
    """A Llama, or a T5 where the configuration is one of an encoder–decoder."""
    from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

    if "d_model" in config:
        model = T5ForConditionalGeneration(T5Config(**config)).eval()
        model.get_input_embeddings().weight.data *= EMBEDDING_SCALE
        return model
    return LlamaForCausalLM(LlamaConfig(**config)).eval()


def size_bytes(folder: Path) -> int:
    """Size of the weights."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def describe(folder: Path) -> dict[str, Any]:
    """What a result says about the model."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return {
        "name": folder.name,
        "architecture": config.get("architectures", ["?"])[0],
        "weights_bytes": size_bytes(folder),
        **{name: config[name] for name in CONFIG if name in config and not name.endswith("_token_id")},
    }


def random_prompts(vocab_size: int, num_prompts: int, num_tokens: int, seed: int = 1) -> list[list[int]]:
    """Prompts of random token ids without the special ones, the same for every engine."""
    import numpy as np

    generator = np.random.default_rng(seed)
    ids = generator.integers(len(SPECIAL_TOKENS), vocab_size, (num_prompts, num_tokens))
    prompts: list[list[int]] = ids.tolist()
    return prompts


def _tokenizer(vocab_size: int) -> Any:
    """Byte-level, without merges; the rest of the vocabulary is filled up with words that no text contains."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [f"<unused_{index}>" for index in range(vocab_size - len(tokens))]
    bpe = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bos, eos, pad = SPECIAL_TOKENS
    # No text has an unknown token, but CTranslate2's converter of T5 asks what it is.
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=bos, eos_token=eos, pad_token=pad, unk_token=pad)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
