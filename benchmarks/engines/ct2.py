"""CTranslate2: its own converter, then ``generate_batch``; a callback tells when each step's tokens are known.

The prompt's last token is forwarded with the first decode step, so its prefill includes one such step.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from benchmarks.engines import Generate, Generation, Limits, Prompts

QUANTIZATION = {"fp32": "float32", "int8": "int8"}


def prepare(checkpoint: Path, out: Path, precision: str) -> None:
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(str(checkpoint)).convert(str(out), quantization=QUANTIZATION[precision], force=True)


def load(checkpoint: Path, folder: Path, precision: str, limits: Limits) -> Generate:
    import ctranslate2
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    generator = ctranslate2.Generator(
        str(folder),
        device="cpu",
        compute_type=QUANTIZATION[precision],
        inter_threads=1,
        intra_threads=limits.num_threads,
    )

    def generate(prompts: Prompts, num_new: int) -> Generation:
        words = [[tokenizer.id_to_token(token) for token in prompt] for prompt in prompts]
        marks = [0.0] * (num_new + 1)

        def mark(result: Any) -> bool:
            marks[result.step + 1] = time.perf_counter()  # the last row's stays
            return False

        marks[0] = time.perf_counter()
        results = generator.generate_batch(
            words, max_length=num_new, min_length=num_new, include_prompt_in_result=False, callback=mark
        )
        return Generation([list(result.sequences_ids[0]) for result in results], marks)

    return generate
