"""Every parameter's type and range, both dialects, and what comes back."""

from __future__ import annotations

import json

import pytest

from triton_backend.errors import InvalidRequest
from triton_backend.grammar_params import GrammarSpec
from triton_backend.parameter_kinds import Flag, Number, Texts, TokenIds
from triton_backend.protocol import (
    INPUTS,
    MAX_PROMPT_BYTES,
    GenerateResponse,
    SequenceOutput,
    TokenLogprob,
    parse_request,
    response_tensors,
)
from triton_backend.sampling_params import FIELDS, UNSUPPORTED, SamplingParams

pytestmark = pytest.mark.unit


def parse(**tensors):
    return parse_request("r", {"text_input": [b"hello"], **tensors})


def refused(**tensors) -> str:
    with pytest.raises(InvalidRequest) as caught:
        parse(**tensors)
    return str(caught.value)


def test_the_two_dialects_mean_the_same():
    vllm = parse(
        sampling_parameters=[b'{"max_tokens": "7", "temperature": 0.5, "stop": ["a", "b"], "seed": 3, "n": 2}']
    )
    trt = parse(max_tokens=[7], temperature=[0.5], stop_words=[b"a", b"b"], seed=[3], num_return_sequences=[2])
    assert vllm == trt
    assert vllm.params == SamplingParams(max_tokens=7, temperature=0.5, stop=("a", "b"), seed=3, n=2)


def test_a_tensor_beats_json_which_beats_request_parameters_which_beat_the_models_defaults():
    tensors = {"text_input": [b"x"], "max_tokens": [1], "sampling_parameters": [b'{"max_tokens": 2, "top_k": 2}']}
    request = parse_request("r", tensors, {"max_tokens": 3, "top_k": 3, "top_p": 0.3}, {"top_p": 0.9, "min_p": 0.1})
    assert (request.params.max_tokens, request.params.top_k) == (1, 2)
    assert (request.params.top_p, request.params.min_p) == (0.3, 0.1)


def test_a_tensor_wins_under_each_of_a_parameters_names():
    weaker = b'{"num_return_sequences": 3, "n": 2, "stop": ["a"], "min_tokens": 5}'
    request = parse(sampling_parameters=[weaker], num_return_sequences=[4], stop_words=[b"b"], min_length=[1])
    assert (request.params.n, request.params.stop, request.params.min_tokens) == (4, ("b",), 1)
    tensors = {"text_input": [b"x"], "sampling_parameters": [b'{"n": 2}']}
    assert parse_request("r", tensors, {"num_return_sequences": 3}).params.n == 2


def test_every_tensor_of_a_parameter_reaches_it():
    params = parse(
        beam_width=[4], length_penalty=[0.5], early_stopping=[True], lora_name=[b"legal"], decoder_input_ids=[1, 2],
        guided_decoding_guide=[b"a+"], guided_decoding_guide_type=[b"regex"],
    ).params  # fmt: skip
    assert (params.beam_width, params.length_penalty, params.early_stopping) == (4, 0.5, True)
    assert (params.adapter, params.decoder_input_ids, params.grammar) == ("legal", (1, 2), GrammarSpec("regex", "a+"))


def test_scores_and_prompt_log_probabilities_are_absent_unless_asked_for():
    assert not {"sequence_scores", "prompt_logprobs"} & response_tensors(parse(), RESPONSE).keys()


def test_unknown_parameters_are_ignored():
    request = parse_request("r", {"text_input": [b"x"], "sampling_parameters": [b'{"frobnicate": 1}']}, {"zap": "1"})
    assert request.params == SamplingParams()


@pytest.mark.parametrize("name", [name for name, kind in FIELDS.items() if isinstance(kind, Number)])
def test_numbers_out_of_range_or_of_another_type_are_refused_by_name(name):
    kind = FIELDS[name]
    bad_values = [kind.low - 1, "many", True, [1], {}, float("nan"), "nan", 10**30]
    bad_values += [1.5] if kind.kind is int else []
    for bad in bad_values:
        message = refused(sampling_parameters=[json.dumps({name: bad}).encode()])
        assert message.startswith(f"INVALID_ARG: {name} has value ")
        assert "expected a" in message


@pytest.mark.parametrize("name", [name for name, kind in FIELDS.items() if isinstance(kind, Flag)])
def test_flags_of_another_type_are_refused_by_name(name):
    for bad in (1, "yes", []):
        assert f"{name} has value" in refused(sampling_parameters=[json.dumps({name: bad}).encode()])


@pytest.mark.parametrize("name", [name for name, kind in FIELDS.items() if isinstance(kind, (Texts, TokenIds))])
def test_lists_of_another_type_or_too_long_are_refused_by_name(name):
    for bad in ({"a": 1}, 1.5, [None], [[1]], [-1] * 2, list(range(10**5)), ["x"] * 10**5):
        assert name in refused(sampling_parameters=[json.dumps({name: bad}).encode()])


@pytest.mark.parametrize("name", sorted(UNSUPPORTED))
def test_a_known_parameter_that_cannot_be_honoured_is_refused_unless_it_asks_for_nothing(name):
    assert f"{name} has value" in refused(sampling_parameters=[json.dumps({name: 7}).encode()])
    for neutral in UNSUPPORTED[name]:
        parse(sampling_parameters=[json.dumps({name: neutral}).encode()])


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"text_input": [b"\xff\xfe"]}, "not valid UTF-8 (byte 0xff at offset 0)"),
        ({"text_input": [b"x" * (MAX_PROMPT_BYTES + 1)]}, f"expected at most {MAX_PROMPT_BYTES}"),
        ({"text_input": [b"a", b"b"]}, "text_input has 2 values; expected exactly 1"),
        ({"input_ids": [1]}, "text_input and input_ids are both given"),
        ({"sampling_parameters": [b"{"]}, "sampling_parameters is not valid JSON"),
        ({"sampling_parameters": [b"[" * 100_000]}, "sampling_parameters is not valid JSON"),
        ({"sampling_parameters": [b"[1]"]}, "sampling_parameters is a JSON list; expected an object"),
        ({"stop": [b"\xff"]}, "stop is not valid UTF-8"),
        ({"stream": [True], "exclude_input_in_output": [False]}, "streams never repeat the prompt"),
        ({"min_tokens": [9], "max_tokens": [3]}, "min_tokens has value 9; expected at most max_tokens = 3"),
        ({"health_probe": [True], "max_tokens": [2]}, "health_probe needs max_tokens = 1"),
        ({"health_probe": [True], "max_tokens": [1], "lora_name": [b"a"]}, "n = 1 and no adapter"),
    ],
)
def test_bad_requests_say_what_is_wrong(tensors, said):
    assert said in refused(**tensors)


def test_a_request_without_a_prompt_is_refused():
    with pytest.raises(InvalidRequest, match="text_input is missing"):
        parse_request("r", {})


def test_values_that_other_servers_clients_send_for_nothing_are_harmless():
    request = parse(end_id=[-1], pad_id=[0], stop_words=[b""], bad_words=[b""], beam_width=[1], length_penalty=[1.0])
    assert request.params == SamplingParams()
    assert parse(end_id=[1048576]).params.stop_token_ids == (1048576,)


@pytest.mark.parametrize("end_id", [{"end_id": 2}, {"end_id": "2"}])
def test_an_end_id_is_one_more_stop_token(end_id):
    in_json = {"stop_token_ids": [5], **end_id}
    assert parse(sampling_parameters=[json.dumps(in_json).encode()]).params.stop_token_ids == (5, 2)
    assert parse(end_id=[2], sampling_parameters=[b'{"stop_token_ids": ["5"]}']).params.stop_token_ids == (5, 2)
    assert parse(sampling_parameters=[b'{"end_id": "-1", "allowed_token_ids": ["7"]}']).params.stop_token_ids == ()


def test_a_probe_does_not_take_the_models_defaults():
    tensors = {"input_ids": [0], "health_probe": [True], "max_tokens": [1]}
    assert not parse_request("r", tensors, {}, {"beam_width": 4}).params.is_beam


def test_a_token_that_cannot_be_has_a_log_probability_of_null():
    never = TokenLogprob(7, float("-inf"), 9, "x")
    output = SequenceOutput(0, "x", (7,), logprobs=((never,),))
    (text,) = response_tensors(parse(return_logprobs=[True]), GenerateResponse("r", (output,)))["logprobs"]
    assert json.loads(text) == [{"7": {"logprob": None, "rank": 9, "decoded_token": "x"}}]


def test_asking_for_log_probabilities_turns_them_on():
    assert parse(return_log_probs=[True]).params.logprobs == 0
    assert parse(return_cumulative_logprob=[True]).params.logprobs == 0
    assert parse(return_logprobs=[True], sampling_parameters=[b'{"logprobs": 3}']).params.logprobs == 3


def test_every_input_is_optional_so_that_any_client_may_leave_out_any_of_them():
    assert all(spec.optional for spec in INPUTS)
    assert len({spec.name for spec in INPUTS}) == len(INPUTS)


RESPONSE = GenerateResponse(
    "r",
    (
        SequenceOutput(
            0, " world", (5, 6), "stop", -0.5, ((TokenLogprob(5, -0.2, 1, " w", 3), TokenLogprob(6, -2.5, 2, "x")),)
        ),
        SequenceOutput(1, " you", (7,), None, -0.1),
    ),
    num_input_tokens=2,
    finished=True,
    metrics={"queue_s": 0.1},
)


def test_text_comes_with_the_prompt_unless_excluded_or_streamed():
    assert response_tensors(parse(), RESPONSE) == {"text_output": ["hello world", "hello you"]}
    excluded = parse(exclude_input_in_output=[True])
    assert response_tensors(excluded, RESPONSE)["text_output"] == [" world", " you"]
    assert response_tensors(parse(stream=[True]), RESPONSE)["text_output"] == [" world", " you"]


def test_every_return_flag_adds_its_tensor():
    names = [spec.name for spec in INPUTS if spec.name.startswith("return_")]
    tensors = response_tensors(parse(**{name: [True] for name in names}), RESPONSE)
    assert tensors["finish_reason"] == ["stop", "None"]
    assert tensors["num_input_tokens"] == [2]
    assert tensors["num_output_tokens"] == [2, 1]
    assert tensors["output_ids"] == [5, 6, 7]
    assert tensors["cumulative_logprob"] == [-0.5, -0.1]
    assert json.loads(tensors["logprobs"][0]) == [
        {
            "5": {"logprob": -0.2, "rank": 1, "decoded_token": " w", "text_offset": 3},
            "6": {"logprob": -2.5, "rank": 2, "decoded_token": "x"},
        }
    ]
    assert json.loads(tensors["request_metrics"][0]) == {"queue_s": 0.1}
