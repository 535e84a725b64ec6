"""The kinds of requests that the soak mixes, as a table, and what every answer must satisfy."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.checkpoint import random_prompts
from benchmarks.serving.load import EVERYTHING, Call, Reply
from control_plane.triton_wire import generate_response
from triton_backend.protocol import TokenLogprob

CANCEL_AFTER = 3
SHORTEST, LONGEST = 16, 128
MIN_NEW, MAX_NEW = 8, 48


@dataclass(frozen=True)
class Kind:
    """``sampling`` over greedy decoding; every request adds its own seed and number of tokens."""

    sampling: Mapping[str, Any]
    stream: bool = True
    flags: tuple[str, ...] = ()
    is_cancelled: bool = False


# Texts of the seeded checkpoint are words such as <unused_4711>, so a digit or two soon occurs.
KINDS: dict[str, Kind] = {
    "greedy": Kind({}),
    "greedy, one response": Kind({}, stream=False),
    "sampled, whole vocabulary": Kind({"temperature": 1.0}),
    "sampled, top-k": Kind({"temperature": 0.8, "top_k": 20}),
    "sampled, top-p and min-p": Kind({"temperature": 0.5, "top_p": 0.9, "min_p": 0.01}),
    "stop strings": Kind({"temperature": 1.0, "stop": ["77", "_12"]}),
    "log probabilities": Kind({"logprobs": 3}, flags=("return_logprobs",)),
    "n = 2": Kind({"temperature": 0.9, "n": 2}),
    "penalties": Kind(
        {"temperature": 0.7, "repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.2}
    ),
    "cancelled": Kind({"temperature": 1.0}, is_cancelled=True),
}


def requests(vocab_size: int, count: int) -> list[tuple[str, Call]]:
    """``count`` requests, the kinds in turn, each with a prompt that no other has."""
    numbers = random.Random("soak")
    prompts = random_prompts(vocab_size, count, LONGEST, seed=300)
    found = []
    for index, prompt in enumerate(prompts):
        name = list(KINDS)[index % len(KINDS)]
        kind = KINDS[name]
        sampling = {
            "temperature": 0,
            "seed": index,
            "max_tokens": numbers.randint(MIN_NEW, MAX_NEW),
            "ignore_eos": True,
        }
        call = Call(
            tuple(prompt[: numbers.randint(SHORTEST, LONGEST)]),
            {**sampling, **kind.sampling},
            stream=kind.stream,
            flags=(*EVERYTHING, *kind.flags),
            cancel_after=CANCEL_AFTER if kind.is_cancelled else 0,
        )
        found.append((name, call))
    return found


@dataclass
class Text:
    """One sequence of an answer, put together from its responses."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    logprobs: list[tuple[TokenLogprob, ...]] = field(default_factory=list)


def texts(reply: Reply) -> list[Text]:
    found: dict[int, Text] = {}
    for response in reply.responses:
        for output in generate_response(response.get_response()).outputs:
            text = found.setdefault(output.index, Text())
            text.token_ids += output.token_ids
            text.text += output.text
            text.finish_reason = output.finish_reason or text.finish_reason
            text.logprobs += output.logprobs
    return [found[index] for index in sorted(found)]


def problems(call: Call, reply: Reply) -> list[str]:
    """What is wrong with an answer, seen alone; empty if nothing is."""
    if reply.error:
        return [f"error: {reply.error}"]
    found = texts(reply)
    num_input = {int(response.as_numpy("num_input_tokens")[0]) for response in reply.responses}
    wrong = (
        [f"it read {num_input} tokens instead of {len(call.input_ids)}"] if num_input != {len(call.input_ids)} else []
    )
    if call.cancel_after:
        return wrong
    if len(found) != call.sampling.get("n", 1):
        wrong.append(f"{len(found)} sequences instead of {call.sampling.get('n', 1)}")
    return wrong + [problem for text in found for problem in _problems(call.sampling, text)]


def _problems(sampling: Mapping[str, Any], text: Text) -> list[str]:
    num_tokens, limit = len(text.token_ids), sampling["max_tokens"]
    wrong = []
    if not ((text.finish_reason == "length" and num_tokens == limit) or _stopped(sampling, text)):
        wrong.append(f"it ended with {text.finish_reason} after {num_tokens} of {limit} tokens")
    if any(stop in text.text for stop in _stops(sampling)):
        wrong.append("a stop string is part of the text")
    if "logprobs" in sampling and [chosen[0].token_id for chosen in text.logprobs] != text.token_ids:
        wrong.append("log probabilities are not those of its tokens")
    return wrong


def _stopped(sampling: Mapping[str, Any], text: Text) -> bool:
    return bool(_stops(sampling)) and text.finish_reason == "stop" and len(text.token_ids) <= sampling["max_tokens"]


def _stops(sampling: Mapping[str, Any]) -> Sequence[str]:
    stops: Sequence[str] = sampling.get("stop", ())
    return stops
