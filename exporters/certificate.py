"""The proof that an exported version is the original, or how far it is from it: the document in certificate.json.

Greedy tokens of the version, run through the real engine with all prompts at once, are compared with the original's
choices in PyTorch; so are logits of single positions, and what both say about every position of a text. What must hold
depends on the precision and can be set (``exporters.thresholds``). Two tokens whose logits differ by less than the
arithmetic's error are a tie: recorded, not counted as a failure, and the rest of that prompt is not compared. The
version is run first and the original afterwards, so that only one of them is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel

from exporters import held_out
from exporters.checkpoint import Checkpoint
from exporters.comparison import PromptResult, TextComparison, TextLogits, difference, finite, judge, top_of
from exporters.engine_process import EngineRun, run_prompts
from exporters.events import Progress
from exporters.generation_config import suppressed_tokens
from exporters.logits import ExportedGraph, original_logits
from exporters.original import load_model, load_tokenizer
from exporters.passages import Passage, passage_of, text_passages
from exporters.prompts import TEXTS, Prompt, make_prompts
from exporters.thresholds import Thresholds, at_most, check, thresholds_for
from exporters.usage import return_freed_memory
from exporters.version import environment
from triton_backend.config import VersionConfig

FORMAT = 2
MAX_PROMPT_TOKENS_FOR_LOGITS = 256
"""Longer prompts are not computed once more for the logits behind them."""
MAX_KEPT_BYTES = 128 << 20
"""Whole distributions on text that are kept until the original can be run."""
NUM_SHARED_TOKENS = 32
"""Tokens of the text that the shipped graph reads as well as the edited one."""
NUM_GENERATED_PROMPTS, NUM_GENERATED_TOKENS = 2, 24
"""Prompts that the original also continues token by token with its own cache; the others take one forward pass."""


class Ticker:
    """Counts pieces of work as progress. Owned by the thread that certifies."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def __call__(self) -> None:
        self._done += 1
        self._progress.progress(self._done, self._total)


def certify(
    folder: Path,
    checkpoint: Checkpoint,
    sliding_window: int | None,
    progress: Progress,
    thresholds: Thresholds | None = None,
    eval_text: Path | None = None,
) -> dict[str, Any]:
    """Compare the version in ``folder`` with ``checkpoint`` and return the certificate; it may not pass.

    ``thresholds`` are those of the version's precision by default, ``eval_text`` is a file to use instead of our text.
    """
    config = VersionConfig.read(folder)
    thresholds = thresholds or thresholds_for(config.model.precision)
    if config.model.kind == "encoder":
        from exporters.encoder_certificate import certify_encoder

        return certify_encoder(folder, checkpoint, progress, thresholds)
    return _certify_decoder(folder, config, checkpoint, sliding_window, progress, thresholds, eval_text)


def _certify_decoder(
    folder: Path,
    config: VersionConfig,
    checkpoint: Checkpoint,
    sliding_window: int | None,
    progress: Progress,
    thresholds: Thresholds,
    eval_text: Path | None,
) -> dict[str, Any]:
    """The certificate of a model that writes tokens: a decoder, alone or behind an encoder."""
    tokenizer = load_tokenizer(checkpoint)

    def encode(text: str) -> list[int]:
        return list(tokenizer(text)["input_ids"])

    prompts = make_prompts(
        encode,
        config.model.source_vocab_size or config.model.vocab_size,
        config.engine.max_model_len,
        config.engine.max_num_batched_tokens,
        sliding_window,
        config.engine.max_source_len,
        config.model.pad_token_id,
    )
    text = held_out.read_text(eval_text)
    texts = text_passages(config, encode, text)
    tick = Ticker(progress, 2 * (len(prompts) + len(texts)))

    run = run_prompts(folder, config, prompts, tick)
    passages = [passage_of(config, prompt, tokens) for prompt, tokens in zip(prompts, run.tokens, strict=True)]
    shipped = ExportedGraph(folder, config)
    found_logits = probe(shipped, passages)
    begin, positions = _beginning(texts)
    shipped_logits = shipped.at(begin, positions, texts[0].source)
    del shipped
    return_freed_memory()
    stride = -(-4 * config.model.vocab_size * sum(len(passage.tokens) for passage in texts) // MAX_KEPT_BYTES)
    exported = TextLogits(stride, config.model.suppressed_token_ids)
    edited_logits = _read_texts(folder, config, texts, exported, tick)
    return_freed_memory()

    model = load_original(checkpoint, config)
    suppressed = suppressed_tokens(model)
    results, expected_logits = [], []
    for prompt, passage, tokens, found in zip(prompts, passages, run.tokens, found_logits, strict=True):
        logits = original_logits(model, passage.ids, passage.source, max(1, len(passage.tokens)))
        if found is not None:
            expected_logits.append(logits[0].numpy())
        top = top_of(found, config.model.suppressed_token_ids) if found is not None else ()
        results.append(_result(prompt, tokens, passage, logits, top, thresholds, suppressed))
        tick()
    comparer = TextComparison(exported, suppressed)
    for passage in texts:
        logits = original_logits(model, passage.ids, passage.source, len(passage.tokens))
        comparer.add(logits, passage.tokens)
        tick()
    comparison = {
        "logits": comparer.logits(expected_logits, [logits for logits in found_logits if logits is not None]),
        "text": {
            "sha256": held_out.sha256_of_text(text),
            **comparer.text(),
            "max_difference_to_shipped_graph": finite(difference(shipped_logits, edited_logits)[0]),
        },
        "generate": _check_generate(model, config, results, thresholds.tie_logit_gap),
        "tokenizer": {"num_texts": len(TEXTS), "num_different": num_tokenized_differently(folder, tokenizer)},
        "original_attention": model.config._attn_implementation,
        "sliding_window": sliding_window,
    }
    return _document(folder, config, thresholds, results, comparison, run, progress)


def probe(graph: ExportedGraph, passages: Sequence[Passage]) -> list[np.ndarray | None]:
    """Logits (V,) of the shipped graph where each passage's first token is chosen; None for long prompts."""
    return [
        graph.at(passage.ids[: passage.first + 1], [passage.first], passage.source)[0]
        if len(passage.source) + passage.first < MAX_PROMPT_TOKENS_FOR_LOGITS and passage.tokens
        else None
        for passage in passages
    ]


def _beginning(texts: Sequence[Passage]) -> tuple[tuple[int, ...], list[int]]:
    """A few tokens of the text, and positions among them at which the shipped and the edited graph must agree."""
    begin = texts[0].ids[:NUM_SHARED_TOKENS]
    return begin, [0, len(begin) // 2, len(begin) - 1]


def load_original(checkpoint: Checkpoint, config: VersionConfig) -> PreTrainedModel:
    """The checkpoint's model in PyTorch, as the kind of model that the version is."""
    if config.model.kind == "encoder_decoder":
        from exporters.original import load_seq2seq_model

        return load_seq2seq_model(checkpoint)
    return load_model(checkpoint)


def _read_texts(
    folder: Path, config: VersionConfig, texts: Sequence[Passage], exported: TextLogits, tick: Callable[[], None]
) -> np.ndarray:
    """Have the exported version read ``texts``. Returns its logits at the positions of ``_beginning``."""
    graph = ExportedGraph(folder, config)
    wanted: list[np.ndarray] = []
    for passage in texts:
        position = 0
        for logits in graph.chunks(passage.ids, passage.source):
            if passage is texts[0]:
                rows = [index - position for index in _beginning(texts)[1]]
                wanted += [logits[row] for row in rows if 0 <= row < len(logits)]
            begin, done = max(passage.first - position, 0), max(position - passage.first, 0)
            found = logits[begin:]
            exported.add(torch.from_numpy(found), passage.tokens[done : done + len(found)])
            position += len(logits)
        tick()
    return np.stack(wanted)


def _result(
    prompt: Prompt,
    tokens: Sequence[int],
    passage: Passage,
    logits: torch.Tensor,
    top: tuple[tuple[int, float], ...],
    thresholds: Thresholds,
    suppressed: Sequence[int],
) -> PromptResult:
    num_forced = len(tokens) - len(passage.tokens)
    logits = logits[-len(passage.tokens) :]
    verdict = judge(logits, passage.tokens, prompt.num_new_tokens - num_forced, thresholds.tie_logit_gap, suppressed)
    return PromptResult(
        name=prompt.name,
        num_prompt_tokens=len(prompt.ids),
        num_new_tokens=len(passage.tokens),
        **asdict(verdict),
        prompt_ids=prompt.ids,
        token_ids=tuple(tokens),
        top=top,
    )


def _check_generate(
    model: PreTrainedModel, config: VersionConfig, results: Sequence[PromptResult], tie_logit_gap: float
) -> dict[str, Any]:
    """Whether the original, token by token with its own cache, writes what one forward pass of it said it would."""
    chosen = [result for result in results if not result.name.startswith(("random", "long", "past"))]
    chosen = (chosen or list(results))[:NUM_GENERATED_PROMPTS]
    num_equal = 0
    for result in chosen:
        passage = passage_of(config, Prompt(result.name, result.prompt_ids, result.num_new_tokens), result.token_ids)
        num_new = min(NUM_GENERATED_TOKENS, len(passage.tokens))
        expected = list(passage.tokens[: result.num_equal])
        if result.expected is not None:
            expected.append(result.expected)
        generated = generate(model, config, passage, num_new)
        expected, generated = expected[:num_new], generated[: len(expected)]
        num_equal += expected == generated or _is_tie(model, passage, expected, generated, tie_logit_gap)
    return {"num_prompts": len(chosen), "num_new_tokens": NUM_GENERATED_TOKENS, "num_equal": num_equal}


def _is_tie(
    model: PreTrainedModel, passage: Passage, expected: Sequence[int], generated: Sequence[int], tie_logit_gap: float
) -> bool:
    position = next((i for i, (a, b) in enumerate(zip(expected, generated, strict=False)) if a != b), None)
    if position is None:
        return False
    logits = original_logits(model, passage.ids[: passage.first + position + 1], passage.source, 1)[-1]
    return abs(float(logits[expected[position]] - logits[generated[position]])) < tie_logit_gap


def generate(model: Any, config: VersionConfig, passage: Passage, num_new: int) -> list[int]:
    """Greedy tokens of the original: the model's own generation settings, end of sequence included, are put aside."""
    plain = GenerationConfig(
        do_sample=False,
        max_new_tokens=num_new,
        pad_token_id=0,
        decoder_start_token_id=config.model.decoder_start_token_id,
        suppress_tokens=suppressed_tokens(model) or None,
    )
    # generate() fills what its argument leaves out from the model's, so both must be plain.
    model.generation_config = plain
    begun = torch.tensor([passage.ids[: passage.first + 1]])
    ids = torch.tensor([passage.source]) if passage.source else begun
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if passage.source:
        inputs["decoder_input_ids"] = begun
    with torch.no_grad():
        output: Any = model.generate(**inputs, generation_config=plain)
    return [int(token) for token in output[0, begun.shape[1] :]]


def _document(
    folder: Path,
    config: VersionConfig,
    thresholds: Thresholds,
    results: Sequence[PromptResult],
    comparison: Mapping[str, Any],
    run: EngineRun,
    progress: Progress,
) -> dict[str, Any]:
    counts = {kind: sum(result.result == kind for result in results) for kind in ("equal", "tie", "mismatch")}
    logits, text, generated = comparison["logits"], comparison["text"], comparison["generate"]
    num_tokens = max(1, sum(result.num_new_tokens for result in results))
    agreement = sum(result.num_agreeing for result in results) / num_tokens
    checks = check(
        thresholds,
        {
            "max_mismatches": counts["mismatch"],
            "max_relative_logit_difference": logits["max_relative_difference"],
            "min_agreement": agreement,
            "min_text_agreement": text["agreement"],
            "max_kl_mean": text["kl_mean"],
            "max_kl_p99": text["kl_p99"],
            "max_perplexity_ratio": text["perplexity_ratio"],
        },
    )
    edited = text["max_difference_to_shipped_graph"]
    checks += [
        at_most("texts_tokenized_differently", comparison["tokenizer"]["num_different"], 0),
        at_most("prompts_generated_differently", generated["num_prompts"] - generated["num_equal"], 0),
        at_most("max_difference_to_shipped_graph", edited, thresholds.tie_logit_gap),
    ]
    passed = all(found.passed for found in checks)
    size_bytes = sum(path.stat().st_size for path in folder.iterdir())
    steps = progress.timings()
    export_peak = max((used.peak_rss_bytes for used in steps.values()), default=None)
    return {
        "format": FORMAT,
        "kind": config.model.kind,
        "precision": config.model.precision,
        "passed": passed,
        "summary": {
            "passed": passed,
            "precision": config.model.precision,
            "num_prompts": len(results),
            "num_equal": counts["equal"],
            "num_ties": counts["tie"],
            "num_mismatches": counts["mismatch"],
            "num_tokens_compared": sum(result.num_equal for result in results),
            "agreement": agreement,
            "text_agreement": text["agreement"],
            "max_logit_difference": logits["max_difference"],
            "mean_logit_difference": logits["mean_difference"],
            "kl_mean": text["kl_mean"],
            "kl_p99": text["kl_p99"],
            "perplexity_original": text["perplexity_original"],
            "perplexity_ratio": text["perplexity_ratio"],
            "prefill_tokens_per_s": run.speed["prefill_tokens_per_s"],
            "decode_tokens_per_s": run.speed["decode_tokens_per_s"],
            "size_bytes": size_bytes,
            "peak_rss_bytes": run.peak_rss_bytes,
            "export_peak_rss_bytes": export_peak,
            "failed": [found.name for found in checks if not found.passed],
        },
        "thresholds": asdict(thresholds),
        "checks": [asdict(found) for found in checks],
        "agreement": agreement,
        "fraction_before_difference": sum(result.num_equal for result in results) / num_tokens,
        "tokens": [asdict(result) for result in results],
        **comparison,
        "speed": dict(run.speed),
        "memory": {
            "size_bytes": size_bytes,
            "peak_rss_bytes": run.peak_rss_bytes,
            "export_peak_rss_bytes": export_peak,
        },
        "steps": {name: asdict(used) for name, used in steps.items()},
        "environment": environment(),
    }


def num_tokenized_differently(folder: Path, tokenizer: Any) -> int:
    """How many texts get other ids from tokenizer.json alone, as the engine reads it, than from transformers."""
    from tokenizers import Tokenizer

    written = Tokenizer.from_file(str(folder / "tokenizer.json"))
    written.no_truncation()
    written.no_padding()
    return sum(written.encode(text).ids != list(tokenizer(text)["input_ids"]) for _, text in TEXTS)
