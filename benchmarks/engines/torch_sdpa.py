"""transformers in PyTorch with its default attention, driven step by step with a growing cache.

It is also the judge of what the other engines write.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.engines import Generate, Limits, Prompts, stepwise


def prepare(checkpoint: Path, out: Path, precision: str) -> None:
    """Nothing: transformers reads the checkpoint itself."""


def load(checkpoint: Path, folder: Path, precision: str, limits: Limits) -> Generate:
    return load_with("sdpa", checkpoint, limits)


def judge(checkpoint: Path, prompts: Prompts, texts: Prompts, limits: Limits) -> list[tuple[int, float]]:
    """Of every token in ``texts``, what the original thinks of it after the prompt and the tokens before it.

    Its rank among all tokens (0 is the original's own choice) and by how much the largest logit exceeds its logit.
    """
    import torch

    model = _model("sdpa", checkpoint, limits)
    found: list[tuple[int, float]] = []
    with torch.inference_mode():
        for prompt, tokens in zip(prompts, texts, strict=True):
            ids = torch.tensor([[*prompt, *tokens[:-1]]])
            logits = model(ids, logits_to_keep=len(tokens)).logits[0]  # (tokens, V)
            chosen = logits.gather(1, torch.tensor(tokens)[:, None])
            ranks, gaps = (logits > chosen).sum(-1), logits.amax(-1) - chosen[:, 0]
            found += zip(ranks.tolist(), gaps.tolist(), strict=True)
    return found


def load_with(attention: str, checkpoint: Path, limits: Limits) -> Generate:
    import torch
    from transformers import DynamicCache

    model = _model(attention, checkpoint, limits)
    cache: list[Any] = []

    @torch.inference_mode()
    def run(ids: list[list[int]]) -> list[int]:
        output = model(torch.tensor(ids), past_key_values=cache[0], use_cache=True, logits_to_keep=1)
        tokens: list[int] = output.logits[:, -1].argmax(-1).tolist()
        return tokens

    def prefill(prompts: Prompts) -> list[int]:
        cache[:] = [DynamicCache(config=model.config)]
        return run([list(prompt) for prompt in prompts])

    def step(tokens: list[int]) -> list[int]:
        return run([[token] for token in tokens])

    return stepwise(prefill, step)


def _model(attention: str, checkpoint: Path, limits: Limits) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(limits.num_threads)
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation=attention).eval()
