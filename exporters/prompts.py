"""The prompts of a certificate: real text of many kinds, random token ids, and the lengths at which things change.

One prompt has a single token, and the longest are longer than what the engine prefills in one step and, where the
context allows, than the model's attention window. Everything is derived from the model's own tokenizer and limits, so
the same version always gets the same prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

TEXTS = (
    ("story", "Once upon a time, in a village between two rivers, there lived a clockmaker who could not sleep."),
    ("question", "What is the difference between a list and a tuple in Python, and when should I use which?"),
    ("code", "def fibonacci(n):\n    a, b = 0, 1\n    for i in range(n):\n        yield a\n        a, b = b, a + b\n"),
    ("numbers", "3.14159 26535 89793, 1/7 = 0.142857…, 2^10 = 1024; total: $1,299.00 (19 % VAT: $207.40)."),
    ("german", "Über sieben Brücken mußt du gehn, sieben dunkle Jahre überstehn – größer als je zuvor."),
    ("chinese", "语言模型把文字变成数字,再把数字变回文字。今天天气很好,我们去公园散步吧。"),
    ("arabic_emoji", "مرحبا بالعالم 👋🌍 — naïve café, ¿qué tal? ελληνικά, русский язык, 日本語 🎉"),
    ("json", '{"name": "llmos", "tags": ["a", "b"], "nested": {"x": null, "y": [1, 2.5e-3, true]}}'),
    ("science", "The mitochondrion is the organelle in which most of the cell's adenosine triphosphate is produced."),
)
RANDOM_LENGTHS = (1, 2, 7, 16, 33)
NUM_NEW_TOKENS = 64
LONGEST_PROMPT = 2048
"""Longer prompts would make certifying slow and show nothing new."""


@dataclass(frozen=True)
class Prompt:
    name: str
    ids: tuple[int, ...]
    num_new_tokens: int


def make_prompts(
    encode: Callable[[str], list[int]],
    vocab_size: int,
    max_model_len: int,
    max_num_batched_tokens: int,
    sliding_window: int | None,
    max_source_len: int = 0,
    pad_token_id: int | None = None,
) -> list[Prompt]:
    """At least 16 prompts that, with their new tokens, fit into ``max_model_len``; into ``max_source_len``, which is
    not shared with new tokens, if it is given.
    """
    num_new = min(NUM_NEW_TOKENS, max(1, max_model_len // 2))
    longest = min(max_source_len or max_model_len - num_new, LONGEST_PROMPT)
    generator = np.random.default_rng(0)

    def random_ids(length: int) -> list[int]:
        ids = generator.integers(0, vocab_size, length)
        if max_source_len and pad_token_id is not None:  # an encoder reads padding as no token at all
            ids[ids == pad_token_id] = (pad_token_id + 1) % vocab_size
        return [int(token) for token in ids]

    all_texts = encode("\n\n".join(text for _, text in TEXTS)) or random_ids(1)

    def text_ids(length: int) -> list[int]:
        return (all_texts * (length // len(all_texts) + 1))[:length]

    found = [(f"random_{length}", random_ids(length)) for length in RANDOM_LENGTHS]
    found += [(name, ids) for name, text in TEXTS if (ids := encode(text))]
    # Longer than one prefill step, by a little and by a lot, and past the window.
    chunked = max_num_batched_tokens + 9
    long_lengths = {"long_text": chunked, "long_random": max_num_batched_tokens + max_num_batched_tokens // 2}
    if sliding_window is not None:
        long_lengths["past_window"] = sliding_window + sliding_window // 4 + 5
    for name, length in long_lengths.items():
        length = min(length, longest)
        found.append((name, random_ids(length) if name == "long_random" else text_ids(length)))
    while len(found) < 16:
        found.append((f"random_{len(found)}", random_ids(len(found) * 5)))
    return [Prompt(name, tuple(ids[:longest]), num_new) for name, ids in found]
