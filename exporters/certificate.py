"""The proof that an exported version is the original: the document in certificate.json.

Greedy tokens of the version, run through the real engine with all prompts at once, are compared with
``generate`` on the original in PyTorch, and logits of single positions with each other. Two tokens whose logits differ
by less than the arithmetic's error are a tie: recorded, not counted as a failure, and the rest of that prompt is not
compared. The version is run first and the original afterwards, so that only one of them is in memory.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel

from exporters.checkpoint import Checkpoint
from exporters.engine_process import EngineProcess
from exporters.events import Progress
from exporters.logits import Position, exported_logits, original_logits
from exporters.original import load_model, load_tokenizer
from exporters.prompts import TEXTS, Prompt, make_prompts
from exporters.version import environment
from triton_backend.config import VersionConfig

FORMAT = 1
TIE_LOGIT_GAP = 1e-3
"""Two logits closer than this are a tie: fp32 sums in another order differ by up to about a tenth of it."""
MAX_RELATIVE_LOGIT_DIFFERENCE = 1e-3
"""Largest |exported − original| logit, as a fraction of the largest |logit| at these positions."""
MAX_PROMPT_TOKENS_FOR_LOGITS = 256


@dataclass(frozen=True)
class PromptResult:
    """One prompt. ``result`` is ``equal``, ``tie`` or ``mismatch``; ``position`` is the first new token that differs.

    ``logit_gap`` is by how much the original preferred its own token to the exported version's there.
    """

    name: str
    num_prompt_tokens: int
    num_new_tokens: int
    num_equal: int
    result: str
    position: int | None = None
    expected: int | None = None
    found: int | None = None
    logit_gap: float | None = None


def certify(folder: Path, checkpoint: Checkpoint, sliding_window: int | None, progress: Progress) -> dict[str, Any]:
    """Compare the unsealed version in ``folder`` with ``checkpoint`` and return the certificate; it may not pass."""
    config = VersionConfig.read(folder)
    tokenizer = load_tokenizer(checkpoint)
    prompts = make_prompts(
        lambda text: list(tokenizer(text)["input_ids"]),
        config.model.vocab_size,
        config.engine.max_model_len,
        config.engine.max_num_batched_tokens,
        sliding_window,
    )
    positions = _positions(prompts)

    total = 2 * len(prompts)
    found_logits = exported_logits(folder / config.model.graph, positions)
    found_tokens, speed, peak_rss_bytes = _run_engine(folder, config, prompts, progress, total)

    model = load_model(checkpoint)
    logits = _compare_logits(original_logits(model, positions), found_logits)
    results = []
    for index, prompt in enumerate(prompts):
        results.append(_compare_tokens(model, prompt, found_tokens[index]))
        progress.progress(len(prompts) + index + 1, total)

    counts = {kind: sum(result.result == kind for result in results) for kind in ("equal", "tie", "mismatch")}
    tokenizer_equal = _tokenizes_equally(folder, tokenizer)
    passed = (
        counts["mismatch"] == 0
        and tokenizer_equal
        and logits["max_relative_difference"] <= MAX_RELATIVE_LOGIT_DIFFERENCE
    )
    size_bytes = sum(path.stat().st_size for path in folder.iterdir())
    return {
        "format": FORMAT,
        "passed": passed,
        "summary": {
            "passed": passed,
            "num_prompts": len(prompts),
            "num_equal": counts["equal"],
            "num_ties": counts["tie"],
            "num_mismatches": counts["mismatch"],
            "num_tokens_compared": sum(result.num_equal for result in results),
            "max_logit_difference": logits["max_difference"],
            "prefill_tokens_per_s": speed["prefill_tokens_per_s"],
            "decode_tokens_per_s": speed["decode_tokens_per_s"],
            "size_bytes": size_bytes,
            "peak_rss_bytes": peak_rss_bytes,
        },
        "thresholds": {
            "tie_logit_gap": TIE_LOGIT_GAP,
            "max_relative_logit_difference": MAX_RELATIVE_LOGIT_DIFFERENCE,
        },
        "tokens": [asdict(result) for result in results],
        "logits": logits,
        "tokenizer": {"num_texts": len(TEXTS), "equal": tokenizer_equal},
        "speed": speed,
        "memory": {"size_bytes": size_bytes, "peak_rss_bytes": peak_rss_bytes},
        "original_attention": model.config._attn_implementation,
        "environment": environment(),
    }


def _positions(prompts: Sequence[Prompt]) -> list[Position]:
    """First, middle and last token of every prompt that is short enough to be computed once per position."""
    return [
        Position(prompt.ids, index)
        for prompt in prompts
        if len(prompt.ids) <= MAX_PROMPT_TOKENS_FOR_LOGITS
        for index in sorted({0, len(prompt.ids) // 2, len(prompt.ids) - 1})
    ]


def _run_engine(
    folder: Path, config: VersionConfig, prompts: Sequence[Prompt], progress: Progress, total: int
) -> tuple[dict[int, tuple[int, ...]], dict[str, Any], int | None]:
    """Tokens of every prompt, measured speed, and the engine's peak memory."""
    with EngineProcess(folder) as engine:
        speed = _measure_speed(engine, config)
        tokens: dict[int, tuple[int, ...]] = {}
        started_s = time.monotonic()
        for index, prompt in enumerate(prompts):
            engine.submit(str(index), prompt.ids, prompt.num_new_tokens)
        for done in range(len(prompts)):
            answer = engine.receive()
            tokens[int(answer.request_id)] = answer.token_ids
            progress.progress(done + 1, total)
        elapsed_s = time.monotonic() - started_s
        speed["batch_tokens_per_s"] = round(sum(map(len, tokens.values())) / elapsed_s, 1)
        engine.finish()
    return tokens, speed, engine.peak_rss_bytes


def _measure_speed(engine: EngineProcess, config: VersionConfig) -> dict[str, Any]:
    """Tokens per second of one request alone, after a short one that warms up."""
    generator = np.random.default_rng(1)
    max_model_len = config.engine.max_model_len
    num_prompt, num_new = max_model_len // 2, min(64, max_model_len // 4)
    num_prompt = min(num_prompt, config.engine.max_num_batched_tokens)
    speed: dict[str, Any] = {"num_prompt_tokens": num_prompt, "num_new_tokens": num_new}
    for name, length in (("warm-up", min(16, num_prompt)), ("speed", num_prompt)):
        engine.submit(name, generator.integers(0, config.model.vocab_size, length).tolist(), num_new)
        metrics = engine.receive().metrics
    speed["prefill_tokens_per_s"] = _per_second(num_prompt, metrics.get("prefill_s"))
    speed["decode_tokens_per_s"] = _per_second(num_new - 1, metrics.get("decode_s"))
    return speed


def _per_second(num_tokens: int, seconds: float | None) -> float | None:
    return round(num_tokens / seconds, 1) if seconds else None


def _compare_tokens(model: PreTrainedModel, prompt: Prompt, found: Sequence[int]) -> PromptResult:
    expected = _generate(model, prompt)
    sizes = (prompt.name, len(prompt.ids), prompt.num_new_tokens)
    if list(found) == expected:
        return PromptResult(*sizes, num_equal=len(expected), result="equal")
    pairs = zip(expected, found, strict=False)
    position = next((i for i, (left, right) in enumerate(pairs) if left != right), min(len(expected), len(found)))
    if position >= len(expected) or position >= len(found):  # one of them ended early
        return PromptResult(*sizes, num_equal=position, result="mismatch", position=position)
    with torch.no_grad():
        ids = torch.tensor([[*prompt.ids, *expected[:position]]])
        logits = model(input_ids=ids, use_cache=False).logits[0, -1]
    gap = float(logits[expected[position]] - logits[found[position]])
    return PromptResult(
        *sizes,
        num_equal=position,
        result="tie" if abs(gap) < TIE_LOGIT_GAP else "mismatch",
        position=position,
        expected=expected[position],
        found=found[position],
        logit_gap=gap,
    )


def _generate(model: Any, prompt: Prompt) -> list[int]:
    """Greedy tokens of the original: the model's own generation settings, end of sequence included, are put aside."""
    plain = GenerationConfig(do_sample=False, max_new_tokens=prompt.num_new_tokens, pad_token_id=0)
    # generate() fills what its argument leaves out from the model's, so both must be plain.
    model.generation_config = plain
    ids = torch.tensor([prompt.ids])
    with torch.no_grad():
        output: Any = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=plain)
    return [int(token) for token in output[0, len(prompt.ids) :]]


def _compare_logits(expected: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> dict[str, Any]:
    differences = [np.abs(left - right) for left, right in zip(expected, found, strict=True)]
    largest = max(float(difference.max()) for difference in differences)
    scale = max(float(np.abs(logits).max()) for logits in expected)
    return {
        "num_positions": len(differences),
        "max_difference": largest,
        "mean_difference": float(np.mean([difference.mean() for difference in differences])),
        "max_relative_difference": largest / max(scale, 1e-9),
        "max_logit": scale,
    }


def _tokenizes_equally(folder: Path, tokenizer: Any) -> bool:
    """Whether tokenizer.json alone, as the engine reads it, gives the ids that transformers gives."""
    from tokenizers import Tokenizer

    written = Tokenizer.from_file(str(folder / "tokenizer.json"))
    written.no_truncation()
    written.no_padding()
    return all(written.encode(text).ids == list(tokenizer(text)["input_ids"]) for _, text in TEXTS)
