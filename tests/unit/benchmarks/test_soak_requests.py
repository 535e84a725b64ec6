"""Whether an answer of the soak is wrong, told from the responses that Triton sent."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.grpc import service_pb2
from tritonclient.utils import serialize_byte_tensor

from benchmarks.serving.load import Call, Reply
from benchmarks.serving.soak_requests import problems, texts

pytestmark = pytest.mark.unit


def response(
    texts: list[str], ids: list[list[int]], reasons: list[str], num_input: int = 3, logprobs: list[str] | None = None
) -> triton.InferResult:
    message = service_pb2.ModelInferResponse()

    def add(name: str, data_type: str, values: np.ndarray) -> None:
        tensor = message.outputs.add(name=name, datatype=data_type, shape=list(values.shape))
        assert tensor.name == name
        is_text = data_type == "BYTES"
        message.raw_output_contents.append(serialize_byte_tensor(values).item() if is_text else values.tobytes())

    add("text_output", "BYTES", np.array([text.encode() for text in texts], dtype=np.object_))
    add("finish_reason", "BYTES", np.array([reason.encode() for reason in reasons], dtype=np.object_))
    add("num_input_tokens", "UINT32", np.array([num_input], dtype=np.uint32))
    add("num_output_tokens", "UINT32", np.array([len(each) for each in ids], dtype=np.uint32))
    add("output_ids", "INT32", np.array([i for each in ids for i in each], dtype=np.int32))
    if logprobs is not None:
        add("logprobs", "BYTES", np.array([each.encode() for each in logprobs], dtype=np.object_))
    return triton.InferResult(message)


def call(**sampling: Any) -> Call:
    return Call((5, 6, 7), {"max_tokens": 3, **sampling})


def test_responses_are_put_together_by_sequence():
    reply = Reply(
        responses=[
            response(["a", "x"], [[1], [4, 5]], ["None", "None"]),
            response(["bc", ""], [[2, 3], [6]], ["length", "length"]),
        ]
    )
    first, second = texts(reply)
    assert (first.text, first.token_ids, first.finish_reason) == ("abc", [1, 2, 3], "length")
    assert (second.text, second.token_ids) == ("x", [4, 5, 6])
    assert problems(call(n=2), reply) == []
    assert problems(call(), reply) == ["2 sequences instead of 1"]


def test_an_answer_that_is_not_its_requests_is_told():
    whole = response(["abc"], [[1, 2, 3]], ["length"])
    assert problems(call(), Reply(responses=[whole])) == []
    assert problems(call(), Reply(error="UNAVAILABLE: full")) == ["error: UNAVAILABLE: full"]
    other = response(["abc"], [[1, 2, 3]], ["length"], num_input=4)
    assert problems(call(), Reply(responses=[other])) == ["it read {4} tokens instead of 3"]
    short = response(["ab"], [[1, 2]], ["length"])
    assert problems(call(), Reply(responses=[short])) == ["it ended with length after 2 of 3 tokens"]


def test_a_stop_string_ends_a_text_and_is_not_part_of_it():
    stopped, inside = response(["ab"], [[1, 2]], ["stop"]), response(["abc"], [[1, 2, 3]], ["length"])
    assert problems(call(stop=["c"]), Reply(responses=[stopped])) == []
    assert problems(call(), Reply(responses=[stopped])) == ["it ended with stop after 2 of 3 tokens"]
    assert problems(call(stop=["c"]), Reply(responses=[inside])) == ["a stop string is part of the text"]


def test_log_probabilities_belong_to_the_tokens():
    def of(*ids: int) -> str:
        chosen = (f'{{"{i}": {{"logprob": -1.0, "rank": 1, "decoded_token": "x"}}}}' for i in ids)
        return f"[{', '.join(chosen)}]"

    right = response(["abc"], [[1, 2, 3]], ["length"], logprobs=[of(1, 2, 3)])
    wrong = response(["abc"], [[1, 2, 3]], ["length"], logprobs=[of(1, 3, 2)])
    assert problems(call(logprobs=0), Reply(responses=[right])) == []
    assert problems(call(logprobs=0), Reply(responses=[wrong])) == ["log probabilities are not those of its tokens"]


def test_a_client_that_left_is_not_asked_for_the_rest():
    begun = response(["a"], [[1]], ["None"])
    assert problems(Call((5, 6, 7), {"max_tokens": 3}, cancel_after=1), Reply(responses=[begun])) == []
