"""Text as rows of tokens, and the loss of predicting each next token; what every causal LM recipe shares.

Shapes: ``B`` rows, ``S`` tokens per row, ``N`` tokens of text, ``V`` vocabulary. This module keeps no state and reports
nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerFast


def encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> torch.Tensor:
    """All texts as one row of token ids (N), int64, each ended by the end-of-text token."""
    if not texts:
        return torch.empty(0, dtype=torch.int64)
    end = tokenizer.eos_token_id
    return torch.tensor([token for ids in tokenizer(list(texts), verbose=False)["input_ids"] for token in (*ids, end)])


def batches(tokens: torch.Tensor, batch_size: int, length: int) -> Iterator[torch.Tensor]:
    """Windows (B, S + 1) of ``tokens`` (N) in random order, for ever; every pass cuts the text at other places."""
    while True:
        offset = int(torch.randint(length, ()))
        starts = offset + length * torch.randperm((len(tokens) - offset - 1) // length)
        for chosen in starts.split(batch_size):
            if len(chosen) == batch_size:
                yield torch.stack([tokens[start : start + length + 1] for start in chosen.tolist()])


def next_token_loss(model: PreTrainedModel, rows: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats of predicting ``rows[:, 1:]`` from ``rows[:, :-1]``."""
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits  # (B, S, V)
    return functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def mean_loss(model: PreTrainedModel, tokens: torch.Tensor, length: int) -> tuple[float, int]:
    """(loss in nats per token, tokens predicted) over ``tokens`` (N) cut into windows, without a shorter last one."""
    windows = [tokens[start : start + length + 1] for start in range(0, len(tokens) - length, length)]
    losses = [next_token_loss(model, window[None]).item() for window in windows]
    return sum(losses) / len(losses), length * len(windows)


def has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices natively; 1.5 times the tokens per second where it does."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
