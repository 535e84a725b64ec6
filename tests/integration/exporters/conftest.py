"""Tiny checkpoints of many architectures, made here: random weights large enough that greedy tokens vary."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

CORPUS = (
    "The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs.",
    "def add(a, b):\n    return a + b\n\nfor i in range(10):\n    print(add(i, i))\n",
    "Die Würde des Menschen ist unantastbar. Alle Menschen sind frei und gleich geboren.",
    "One two three four five six seven eight nine ten, 1 2 3 4 5 6 7 8 9 10.",
)
VOCAB_SIZE = 320
CHAT_TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}assistant:"

LLAMA_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
ONE_LAYER = {**LLAMA_SIZES, "num_hidden_layers": 1}
"""Tracing a layer takes half a second; cases that add nothing about layers have one."""
GPT2_SIZES: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}

# name of the case → model_type and what its config adds; windows of 8 are shorter than the prompts.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", LLAMA_SIZES),
    "llama_tied_biased": ("llama", {**LLAMA_SIZES, "tie_word_embeddings": True, "attention_bias": True}),
    "mistral_window": ("mistral", {**ONE_LAYER, "sliding_window": 8}),
    "qwen2": ("qwen2", ONE_LAYER),
    "cohere": ("cohere", ONE_LAYER),
    "gemma3": ("gemma3_text", {**LLAMA_SIZES, "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}),
    "qwen3": ("qwen3", {**ONE_LAYER, "head_dim": 16}),
    "gemma2": (
        "gemma2",
        {
            **LLAMA_SIZES,
            "head_dim": 16,
            "sliding_window": 8,
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "phi3": ("phi3", ONE_LAYER),
    "gpt2": ("gpt2", GPT2_SIZES),
    "gpt_neox": ("gpt_neox", ONE_LAYER),
    "opt": (
        "opt",
        {
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 64,
            "ffn_dim": 128,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
            "word_embed_proj_dim": 64,
        },
    ),
    "mixtral": ("mixtral", {**LLAMA_SIZES, "num_local_experts": 4}),
    "mamba": ("mamba", {"vocab_size": VOCAB_SIZE, "hidden_size": 64, "num_hidden_layers": 2}),
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out architectures whose graphs look like another's that is tested, unless -m asks for them."""
    if "sibling" in config.option.markexpr:
        return
    config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("sibling")])
    items[:] = [item for item in items if not item.get_closest_marker("sibling")]


def make_model(name: str, seed: int = 0, **changes: Any) -> Any:
    """A tiny model in fp32; the same seed gives the same weights."""
    model_type, sizes = ARCHITECTURES[name]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**sizes, **changes})).eval().float()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, trained on four lines."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


@pytest.fixture(scope="session")
def make_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast
) -> Callable[..., Path]:
    """Writes a new checkpoint folder: ``make_checkpoint("llama", seed=1, hidden_size=32)``."""

    def make(name: str = "llama", seed: int = 0, **changes: Any) -> Path:
        folder = tmp_path_factory.mktemp("checkpoint") / name
        model = make_model(name, seed, **changes)
        model.generation_config.update(do_sample=True, temperature=0.6, top_p=0.9, repetition_penalty=1.1)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def llama_checkpoint(make_checkpoint: Callable[..., Path]) -> Path:
    """Shared; tests that change a checkpoint make their own."""
    return make_checkpoint("llama")


@pytest.fixture(scope="session")
def llama_version(llama_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The version folder of ``llama_checkpoint``, without a certificate. Shared and read only."""
    from exporters import ExportConfig, export

    out = tmp_path_factory.mktemp("versions") / "llama" / "1"
    export(ExportConfig(str(llama_checkpoint), out, max_model_len=48, max_num_seqs=4), certify=False)
    return out
