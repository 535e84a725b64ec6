"""The proof that an exported encoder gives the embeddings of its checkpoint: the document in certificate.json.

The version embeds texts of many kinds and lengths in ragged batches, the original embeds each of them alone, without
padding and with its own attention, and is pooled here in the most obvious way. So one comparison covers the graph, the
padding and the pooling. A second one, of the version with itself, says how much a text's embedding depends on the
texts beside it. The version runs first and the original afterwards, so that only one of them is in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from exporters.certificate import num_tokenized_differently
from exporters.checkpoint import Checkpoint
from exporters.embedder import EmbedderProcess
from exporters.encoder import load_encoder
from exporters.errors import InvalidCheckpoint
from exporters.events import Progress
from exporters.original import load_tokenizer
from exporters.pooling import ACTIVATIONS, Pooling, read_pooling
from exporters.prompts import LONGEST_PROMPT, TEXTS
from exporters.thresholds import Thresholds, at_most, check, thresholds_for
from exporters.version import environment
from triton_backend.config import VersionConfig

FORMAT = 1
EXACT_LIMITS = {"max_relative_difference": 1e-3, "max_relative_batch_difference": 1e-4}
"""fp32: largest |exported − original| number, as a fraction of the largest |number| of these embeddings; the same for a
text alone and the same text padded beside others."""
RANDOM_LENGTHS = (1, 2, 7, 16, 33, 64)
BATCH_SIZE = 6
SPEED_ROWS, SPEED_TOKENS, SPEED_ROUNDS = 8, 128, 3


@dataclass(frozen=True)
class TextResult:
    """One text. ``batch_difference`` is by how much its embedding changes when it is embedded alone."""

    name: str
    num_tokens: int
    cosine: float
    max_difference: float
    batch_difference: float


def certify_encoder(
    folder: Path, checkpoint: Checkpoint, progress: Progress, limits: Thresholds | None = None
) -> dict[str, Any]:
    """Compare the unsealed version in ``folder`` with ``checkpoint`` and return the certificate; it may not pass.

    ``limits`` are those of the version's precision by default; of them, only ``min_cosine`` is about embeddings.
    """
    config = VersionConfig.read(folder)
    limits = limits or thresholds_for(config.model.precision)
    tokenizer = load_tokenizer(checkpoint)
    texts = _texts(tokenizer, config.model.vocab_size, config.engine.max_model_len)
    rows = [ids for _, ids in texts]
    total = 3 * len(rows)

    with EmbedderProcess(folder) as embedder:
        speed = _measure_speed(embedder, config)
        batched: list[np.ndarray] = []
        for start in range(0, len(rows), BATCH_SIZE):
            batched += list(embedder(rows[start : start + BATCH_SIZE]).embeddings)
            progress.progress(len(batched), total)
        alone = []
        for row in rows:
            answer = embedder([row])
            alone.append(answer.embeddings[0])
            progress.progress(len(rows) + len(alone), total)
        peak_rss_bytes = answer.peak_rss_bytes

    model, pooling = load_encoder(checkpoint), read_pooling(checkpoint.folder)
    expected = []
    for row in rows:
        expected.append(original_embedding(model, pooling, row))
        progress.progress(2 * len(rows) + len(expected), total)
    if expected[0].shape != batched[0].shape:
        raise InvalidCheckpoint(
            f"the version gives embeddings of {len(batched[0])} numbers, {checkpoint.folder} of {len(expected[0])}; "
            "expected the checkpoint that the version was exported from"
        )

    results = [
        TextResult(
            name,
            len(ids),
            cosine=_cosine(batched[index], expected[index]),
            max_difference=float(np.abs(batched[index] - expected[index]).max()),
            batch_difference=float(np.abs(batched[index] - alone[index]).max()),
        )
        for index, (name, ids) in enumerate(texts)
    ]
    scale = max(float(np.abs(embedding).max()) for embedding in expected)
    mean_difference = float(np.mean([np.abs(a - b).mean() for a, b in zip(batched, expected, strict=True)]))
    measured = {
        "min_cosine": min(result.cosine for result in results),
        "max_relative_difference": max(result.max_difference for result in results) / max(scale, 1e-9),
        "max_relative_batch_difference": max(result.batch_difference for result in results) / max(scale, 1e-9),
    }
    num_different = num_tokenized_differently(folder, tokenizer)
    is_exact = config.model.precision == "fp32"  # a lower precision is measured by its cosines alone
    checks = [
        *check(limits, {"min_cosine": measured["min_cosine"]}),
        *(at_most(name, measured[name], limit if is_exact else None) for name, limit in EXACT_LIMITS.items()),
        at_most("texts_tokenized_differently", num_different, 0),
        at_most("embeddings_not_finite", sum(not np.isfinite(embedding).all() for embedding in batched), 0),
    ]
    passed = all(found.passed for found in checks)
    size_bytes = sum(path.stat().st_size for path in folder.iterdir())
    return {
        "format": FORMAT,
        "kind": "encoder",
        "precision": config.model.precision,
        "passed": passed,
        "summary": {
            "passed": passed,
            "precision": config.model.precision,
            "num_texts": len(results),
            "num_tokens_compared": sum(result.num_tokens for result in results),
            "min_cosine": measured["min_cosine"],
            "max_difference": max(result.max_difference for result in results),
            "mean_difference": mean_difference,
            "max_batch_difference": max(result.batch_difference for result in results),
            "tokens_per_s": speed["tokens_per_s"],
            "size_bytes": size_bytes,
            "peak_rss_bytes": peak_rss_bytes,
            "failed": [found.name for found in checks if not found.passed],
        },
        "thresholds": asdict(limits),
        "checks": [asdict(found) for found in checks],
        "texts": [asdict(result) for result in results],
        "embeddings": {
            **measured,
            "embedding_size": config.model.embedding_size,
            "pooling": config.model.pooling,
            "normalize": config.model.normalize,
            "largest_number": scale,
        },
        "tokenizer": {"num_texts": len(TEXTS), "num_different": num_different},
        "speed": speed,
        "memory": {"size_bytes": size_bytes, "peak_rss_bytes": peak_rss_bytes},
        "original_attention": model.config._attn_implementation,
        "environment": environment(),
    }


def original_embedding(model: PreTrainedModel, pooling: Pooling, ids: Sequence[int]) -> np.ndarray:
    """Embedding (E') of one text by the checkpoint itself."""
    tokens = torch.tensor([list(ids)])
    with torch.no_grad():
        vectors = model(input_ids=tokens, attention_mask=torch.ones_like(tokens))[0][0].float()  # (S, E)
        pooled = {
            "mean": lambda: vectors.mean(dim=0),
            "cls": lambda: vectors[0],
            "last": lambda: vectors[-1],
            "max": lambda: vectors.amax(dim=0),
        }[pooling.mode]()
        for layer in pooling.dense:
            product = layer.weight @ pooled
            pooled = ACTIVATIONS[layer.activation]()(product if layer.bias is None else product + layer.bias)
        if pooling.normalize:
            pooled = pooled / pooled.norm().clamp(min=1e-12)
    return pooled.numpy()


def _texts(tokenizer: Any, vocab_size: int, max_tokens: int) -> list[tuple[str, list[int]]]:
    """At least 16 (name, ids); the longest is as long as the version takes, at most LONGEST_PROMPT."""
    generator = np.random.default_rng(0)
    longest = min(max_tokens, LONGEST_PROMPT)

    def random_ids(length: int) -> list[int]:
        return [int(token) for token in generator.integers(0, vocab_size, length)]

    def text_ids(text: str) -> list[int]:
        return list(tokenizer(text, truncation=True, max_length=longest)["input_ids"])

    everything = "\n\n".join(text for _, text in TEXTS)
    found = [(f"random_{length}", random_ids(length)) for length in RANDOM_LENGTHS]
    found += [(name, ids) for name, text in TEXTS if (ids := text_ids(text))]
    found.append(("long_text", text_ids(everything * (longest // len(TEXTS) + 1))))
    found.append(("long_random", random_ids(longest)))
    while len(found) < 16:
        found.append((f"random_{len(found)}", random_ids(len(found) * 5)))
    # Short and long ones take turns, so that every batch has much padding.
    found.sort(key=lambda text: len(text[1]))
    found = [text for pair in zip(found, found[::-1], strict=True) for text in pair][: len(found)]
    return [(name, ids[:longest]) for name, ids in found if ids]


def _measure_speed(embedder: EmbedderProcess, config: VersionConfig) -> dict[str, Any]:
    """Tokens per second of a batch of texts of one length, the best of some rounds after one that warms up."""
    num_tokens = min(SPEED_TOKENS, config.engine.max_model_len)
    rows = np.random.default_rng(1).integers(0, config.model.vocab_size, (SPEED_ROWS, num_tokens)).tolist()
    elapsed_s = min([embedder(rows).elapsed_s for _ in range(1 + SPEED_ROUNDS)][1:])
    return {
        "num_rows": SPEED_ROWS,
        "num_tokens_per_row": num_tokens,
        "tokens_per_s": round(SPEED_ROWS * num_tokens / elapsed_s, 1),
        "texts_per_s": round(SPEED_ROWS / elapsed_s, 1),
    }


def _cosine(left: np.ndarray, right: np.ndarray) -> float:
    left, right = left.astype(np.float64), right.astype(np.float64)
    return float(left @ right / max(float(np.linalg.norm(left) * np.linalg.norm(right)), 1e-12))
