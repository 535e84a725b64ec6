"""README.md of a starter model: what it learned from, for how long, and how well."""

from __future__ import annotations

import platform


def model_card(
    *, num_parameters: int, vocab_size: int, max_seq_length: int, max_position_embeddings: int, num_text_tokens: int,
    num_trained_tokens: int, num_steps: int, seed: int, perplexity: float
) -> str:  # fmt: skip
    return f"""\
---
language: en
library_name: transformers
pipeline_tag: text-generation
---
# Starter

A Llama-shaped language model of {num_parameters / 1e6:.1f} million parameters, trained from nothing on a CPU. It
continues a text in the manner of Python's documentation: plausible at first sight, and often wrong. Use it to try a
serving system, not to learn Python.

| | |
|---|---|
| text | `pydoc_data.topics` and docstrings of the standard library, Python {platform.python_version()}: \
{num_text_tokens:,} tokens |
| tokenizer | byte-level BPE, {vocab_size:,} tokens; `<|endoftext|>` ends a document |
| training | {num_steps:,} steps, {num_trained_tokens:,} tokens, seed {seed} |
| held-out perplexity | {perplexity:.2f} per token, on one source file in fifteen |
| context | {max_position_embeddings:,} tokens, trained on rows of {max_seq_length:,} |

```python
from transformers import pipeline

print(pipeline("text-generation", "path/to/this/folder")("The import statement")[0]["generated_text"])
```
"""


def seq2seq_card(
    *, num_parameters: int, vocab_size: int, data: str, num_pairs: int, num_steps: int, seed: int, exact_match: float
) -> str:  # fmt: skip
    return f"""\
---
library_name: llmos
---
# Encoder–decoder

A Transformer of {num_parameters / 1e6:.1f} million parameters (`torch.nn.TransformerEncoder` and `TransformerDecoder`),
trained from nothing to turn a source text into a target text.

| | |
|---|---|
| pairs | {data}: {num_pairs:,} for training |
| tokenizer | byte-level BPE, {vocab_size:,} tokens; `<|endoftext|>` ends a text and starts the decoder |
| training | {num_steps:,} steps, seed {seed} |
| held-out exact match | {exact_match:.1%} of targets, greedy |

```python
from control_plane.training.recipes.seq2seq_transformer import Seq2SeqTransformer

model = Seq2SeqTransformer.load(folder)
```
"""
