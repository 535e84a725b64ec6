"""transformers in PyTorch with its default attention: step by step, serving by ``generate``, and its beam search.

It is also the judge of what the other engines write. ``generate`` takes a batch and ends when all of it has ended, so
clients whose requests come later wait for the next batch; prompts are padded on the left.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.engines import BeamSearch, Generate, Limits, Prompts, stepwise
from benchmarks.engines.closed_loop import Arrival, ClosedLoop, Serve

SERVED_BY = "generate, static batches"
RUNS_BATCHES = True


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


def load_with(attention: str, checkpoint: Path, limits: Limits, device: str = "cpu") -> Generate:
    """In fp32 on CPU, in fp16 on a GPU."""
    import torch
    from transformers import DynamicCache

    model = _model(attention, checkpoint, limits, device)
    cache: list[Any] = []

    @torch.inference_mode()
    def run(ids: list[list[int]]) -> list[int]:
        output = model(torch.tensor(ids, device=device), past_key_values=cache[0], use_cache=True, logits_to_keep=1)
        tokens: list[int] = output.logits[:, -1].argmax(-1).tolist()
        return tokens

    def prefill(prompts: Prompts) -> list[int]:
        cache[:] = [DynamicCache(config=model.config)]
        return run([list(prompt) for prompt in prompts])

    def step(tokens: list[int]) -> list[int]:
        return run([[token] for token in tokens])

    return stepwise(prefill, step)


def serve(checkpoint: Path, folder: Path, precision: str, limits: Limits) -> Serve:
    model = endless_model("sdpa", checkpoint, limits)

    def serve_batches(loop: ClosedLoop) -> None:
        while not loop.is_done:
            batch = list(loop.arrivals())
            inputs = left_padded([arrival.prompt for arrival in batch])
            model.generate(**inputs, max_new_tokens=loop.num_new, do_sample=False, streamer=_Marks(loop, batch))

    return serve_batches


class _Marks:
    """A streamer, as ``generate`` calls it: once with the prompts, then with each step's tokens of the batch."""

    def __init__(self, loop: ClosedLoop, batch: list[Arrival]) -> None:
        self._loop, self._batch, self._is_prompt = loop, batch, True

    def put(self, tokens: Any) -> None:
        if not self._is_prompt:
            for arrival, token in zip(self._batch, tokens.tolist(), strict=True):
                self._loop.token(arrival.index, token)
        self._is_prompt = False

    def end(self) -> None:
        """Nothing is held back."""


def beam_search(checkpoint: Path, folder: Path, precision: str, limits: Limits) -> BeamSearch:
    model = endless_model("sdpa", checkpoint, limits)

    def search(prompts: Prompts, width: int, num_new: int) -> list[list[int]]:
        inputs = left_padded(prompts)
        output = model.generate(**inputs, max_new_tokens=num_new, do_sample=False, num_beams=width)
        tokens: list[list[int]] = output[:, -num_new:].tolist()
        return tokens

    return search


def left_padded(prompts: Prompts) -> dict[str, Any]:
    """``input_ids`` and ``attention_mask`` (B, longest prompt)."""
    import torch

    longest = max(map(len, prompts))
    ids = torch.zeros((len(prompts), longest), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def endless_model(attention: str, checkpoint: Path, limits: Limits) -> Any:
    """The model for ``generate``, which writes as many tokens as it is asked for and never ends a text itself."""
    model = _model(attention, checkpoint, limits)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0  # a masked position's token does not matter
    return model


def _model(attention: str, checkpoint: Path, limits: Limits, device: str = "cpu") -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    torch.set_num_threads(limits.num_threads)
    is_seq2seq = AutoConfig.from_pretrained(checkpoint).is_encoder_decoder
    kind = AutoModelForSeq2SeqLM if is_seq2seq else AutoModelForCausalLM
    dtype = torch.float32 if device == "cpu" else torch.float16
    return kind.from_pretrained(checkpoint, dtype=dtype, attn_implementation=attention).eval().to(device)
