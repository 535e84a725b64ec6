"""CTranslate2: its own converter, then ``generate_batch``; a callback tells when each token is known.

The prompt's last token is forwarded with the first decode step, so its prefill includes one such step. In a batch of
prompts of different lengths only the shortest's tokens are forwarded at once, the rest one a step. Serving therefore
cuts what has arrived into batches of similar lengths, as ``max_batch_size`` does, of a size at which its steps are
still short. It has no way to add a request to a running batch.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.engines import BeamSearch, Generate, Generation, Limits, Prompts
from benchmarks.engines.closed_loop import ClosedLoop, Serve

QUANTIZATION = {"fp32": "float32", "int8": "int8"}
SERVED_BY = "generate_batch, static batches by length"
RUNS_BATCHES = True
MAX_BATCH_SIZE = 8
"""A step in fp32 takes 62 ms for 8 rows and 430 ms for 32; and less is lost to differing lengths."""


def prepare(checkpoint: Path, out: Path, precision: str) -> None:
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(str(checkpoint)).convert(str(out), quantization=QUANTIZATION[precision], force=True)


def load(checkpoint: Path, folder: Path, precision: str, limits: Limits) -> Generate:
    import ctranslate2

    words = _Words(checkpoint)
    generator = ctranslate2.Generator(str(folder), **_options(precision, limits))

    def generate(prompts: Prompts, num_new: int) -> Generation:
        batch = words.of(prompts)
        marks = [0.0] * (num_new + 1)

        def mark(result: Any) -> bool:
            marks[result.step + 1] = time.perf_counter()  # the last row's stays
            return False

        marks[0] = time.perf_counter()
        results = generator.generate_batch(
            batch, max_length=num_new, min_length=num_new, include_prompt_in_result=False, callback=mark
        )
        return Generation([list(result.sequences_ids[0]) for result in results], marks)

    return generate


def serve(checkpoint: Path, folder: Path, precision: str, limits: Limits) -> Serve:
    import ctranslate2

    words = _Words(checkpoint)
    generator = ctranslate2.Generator(str(folder), **_options(precision, limits))

    def serve_batches(loop: ClosedLoop) -> None:
        while not loop.is_done:
            by_length = sorted(loop.arrivals(), key=lambda arrival: len(arrival.prompt))
            for first in range(0, len(by_length), MAX_BATCH_SIZE):
                batch = by_length[first : first + MAX_BATCH_SIZE]

                def mark(result: Any, batch: Sequence[Any] = batch) -> bool:
                    loop.token(batch[result.batch_id].index, result.token_id)
                    return False

                generator.generate_batch(
                    words.of([arrival.prompt for arrival in batch]),
                    max_length=loop.num_new,
                    min_length=loop.num_new,
                    include_prompt_in_result=False,
                    callback=mark,
                )

    return serve_batches


def beam_search(checkpoint: Path, folder: Path, precision: str, limits: Limits) -> BeamSearch:
    """Of an encoder–decoder the Translator's, of a decoder the Generator's."""
    import ctranslate2

    words = _Words(checkpoint)
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    if config.get("is_encoder_decoder"):
        translator = ctranslate2.Translator(str(folder), **_options(precision, limits))

        def translate(prompts: Prompts, width: int, num_new: int) -> list[list[int]]:
            found = translator.translate_batch(
                words.of(prompts), beam_size=width, max_decoding_length=num_new, min_decoding_length=num_new
            )
            return [words.ids(result.hypotheses[0]) for result in found]

        return translate
    generator = ctranslate2.Generator(str(folder), **_options(precision, limits))

    def search(prompts: Prompts, width: int, num_new: int) -> list[list[int]]:
        found = generator.generate_batch(
            words.of(prompts), beam_size=width, max_length=num_new, min_length=num_new, include_prompt_in_result=False
        )
        return [list(result.sequences_ids[0]) for result in found]

    return search


class _Words:
    """CTranslate2 takes tokens as texts."""

    def __init__(self, checkpoint: Path) -> None:
        from tokenizers import Tokenizer

        self._tokenizer: Any = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))

    def of(self, prompts: Prompts) -> list[list[str]]:
        return [[self._tokenizer.id_to_token(token) for token in prompt] for prompt in prompts]

    def ids(self, words: Sequence[str]) -> list[int]:
        return [self._tokenizer.token_to_id(word) for word in words]


def _options(precision: str, limits: Limits) -> dict[str, Any]:
    threads = {"inter_threads": 1, "intra_threads": limits.num_threads}
    return {"device": "cpu", "compute_type": QUANTIZATION[precision], **threads}
