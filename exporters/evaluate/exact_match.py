"""Suite ``exact-match``: how many sources get exactly the expected answer. Higher is better.

    exact_match  fraction (0 … 1) of pairs whose answer equals the target, spaces and line breaks at both ends put
                 aside; upper case, punctuation and everything inside count. (Rajpurkar et al. 2016, SQuAD, without its
                 normalization; Hugging Face evaluate's ``exact_match`` with its defaults, after ``strip``)

An encoder–decoder reads the source; a decoder goes on behind the prompt, until its end token or a ``stop`` text.
Nothing is drawn: the most likely token is taken, or the version's own number of beams is searched; its other defaults
(penalties, forced tokens) hold, as they do for who asks it. An answer may have twice as many tokens as its target and
16 more; one that is longer is not the target anyway.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from operator import itemgetter
from typing import Any

from tokenizers import Tokenizer

from exporters.evaluate.answers import Answered, answers
from exporters.evaluate.data_file import Pair
from exporters.evaluate.report import Report, Task, Ticker

MAX_EXAMPLES = 5
MAX_EXAMPLE_CHARS = 400


@dataclass(frozen=True)
class Question:
    pair: Pair
    sampling: dict[str, Any]

    @property
    def place(self) -> str:
        return self.pair.place

    def request(self) -> dict[str, Any]:
        return {"text": self.pair.source, "sampling_parameters": self.sampling}


def exact_match(task: Task) -> Report:
    """How many answers are right; raises InvalidData, EngineFailed. ``examples`` are the first wrong ones."""
    ticker = Ticker(task, task.settings["limit"])
    num_pairs = num_equal = 0
    wrong: list[dict[str, Any]] = []
    with closing(answers(task.folder, task.version, _questions(task))) as found:
        for answered in found:
            num_pairs += 1
            if answered.answer.text.strip() == answered.item.pair.target.strip():
                num_equal += 1
            else:
                wrong = sorted([*wrong, _example(answered)], key=itemgetter("line"))[:MAX_EXAMPLES]
            ticker.tick(num_pairs)
    return Report(
        metrics={"exact_match": num_equal / num_pairs},
        counts={"num_pairs": num_pairs, "num_equal": num_equal},
        settings={**task.settings, **_decoding(task)},
        examples=tuple(wrong),
    )


def _questions(task: Task) -> Iterator[Question]:
    assert task.data is not None
    tokenizer = Tokenizer.from_file(str(task.folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    sampling = {**_decoding(task), "stop": list(task.settings["stop"])}
    for pair in islice(task.data.pairs(), task.settings["limit"]):
        num_tokens = len(tokenizer.encode(pair.target).ids)
        yield Question(pair, {**sampling, "max_tokens": 2 * num_tokens + 16})


def _decoding(task: Task) -> dict[str, Any]:
    width = task.version.model.generation_defaults.get("beam_width", 1)
    return {"beam_width": width} if width > 1 else {"temperature": 0}


def _example(answered: Answered) -> dict[str, Any]:
    pair = answered.item.pair
    texts = {"source": pair.source, "target": pair.target, "answer": answered.answer.text}
    return {"line": pair.line, **{name: text[:MAX_EXAMPLE_CHARS] for name, text in texts.items()}}
