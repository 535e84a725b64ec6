"""Messages to and from Triton, without a server."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
from tritonclient.grpc import service_pb2

from control_plane import errors
from control_plane.triton_wire import GenerateCall, error_from_text, generate_response, infer_request
from triton_backend.protocol import (
    INPUTS,
    GenerateRequest,
    GenerateResponse,
    PromptToken,
    SequenceOutput,
    TokenLogprob,
    response_tensors,
)
from triton_backend.sampling_params import SamplingParams

pytestmark = pytest.mark.unit


def _inputs(request: service_pb2.ModelInferRequest) -> dict[str, bytes]:
    return {tensor.name: raw for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True)}


def test_request_has_only_tensors_of_the_protocol_with_its_types_and_shapes():
    request = infer_request(GenerateCall("m", text="hé", sampling={"max_tokens": 3}, stream=True, return_logprobs=True))
    specs = {spec.name: spec for spec in INPUTS}
    for tensor in request.inputs:
        assert specs[tensor.name].data_type.removeprefix("TYPE_").replace("STRING", "BYTES") == tensor.datatype
        assert list(tensor.shape) == [1]
    assert _inputs(request)["text_input"] == struct.pack("<I", 3) + "hé".encode()
    assert json.loads(_inputs(request)["sampling_parameters"][4:]) == {"max_tokens": 3}


def test_request_with_token_ids_sends_no_text():
    inputs = _inputs(infer_request(GenerateCall("m", input_ids=(5, 6))))
    assert "text_input" not in inputs
    assert np.frombuffer(inputs["input_ids"], np.int32).tolist() == [5, 6]


def test_flag_that_is_off_is_not_sent():
    assert "stream" not in _inputs(infer_request(GenerateCall("m", text="x")))
    assert "health_probe" in _inputs(infer_request(GenerateCall("m", input_ids=(0,), health_probe=True)))


def test_request_always_asks_for_a_final_response():
    request = infer_request(GenerateCall("m", text="x"))
    assert request.parameters["triton_enable_empty_final_response"].bool_param


def _response(final: bool, **tensors: tuple[str, list]) -> service_pb2.ModelInferResponse:
    response = service_pb2.ModelInferResponse(id="r")
    response.parameters["triton_final_response"].bool_param = final
    dtypes = {"INT32": np.int32, "UINT32": np.uint32}
    for name, (datatype, values) in tensors.items():
        if datatype == "BYTES":
            raw = b"".join(struct.pack("<I", len(v.encode())) + v.encode() for v in values)
        else:
            raw = np.array(values, dtypes[datatype]).tobytes()
        response.outputs.add(name=name, datatype=datatype, shape=[len(values)])
        response.raw_output_contents.append(raw)
    return response


def test_token_ids_of_several_sequences_are_split_by_their_counts():
    response = generate_response(
        _response(
            True,
            text_output=("BYTES", ["ab", "é"]),
            finish_reason=("BYTES", ["stop", "None"]),
            num_output_tokens=("UINT32", [2, 1]),
            output_ids=("INT32", [7, 8, 9]),
            num_input_tokens=("UINT32", [4]),
            request_metrics=("BYTES", ['{"cached_tokens": 3}']),
        )
    )
    assert [output.token_ids for output in response.outputs] == [(7, 8), (9,)]
    assert [output.finish_reason for output in response.outputs] == ["stop", None]
    assert [output.text for output in response.outputs] == ["ab", "é"]
    assert (response.num_input_tokens, response.finished, response.metrics) == (4, True, {"cached_tokens": 3})
    assert (response.prompt_logprobs, response.prompt_tokens) == (None, ())


def test_what_the_engine_says_of_a_prompt_comes_back_as_it_was():
    said = GenerateResponse(
        "r",
        (SequenceOutput(0, "x"),),
        prompt_logprobs=(None, (TokenLogprob(7, -0.5, 2, "b"), TokenLogprob(3, float("-inf"), 1, "\ufffd"))),
        prompt_tokens=(PromptToken(5, "\ufffd", ""), PromptToken(7, "b", "é")),
    )
    tensors = response_tensors(GenerateRequest("r", SamplingParams(), text="é", exclude_input_in_output=True), said)
    found = generate_response(_response(False, **{name: ("BYTES", values) for name, values in tensors.items()}))
    assert (found.prompt_logprobs, found.prompt_tokens) == (said.prompt_logprobs, said.prompt_tokens)


def test_logprobs_keep_the_chosen_token_first():
    chosen = {"logprob": -2.0, "rank": 3, "decoded_token": "b"}
    likeliest = {"logprob": -0.1, "rank": 1, "decoded_token": "a"}
    tokens = json.dumps([{"5": chosen, "1": likeliest}])
    response = generate_response(_response(False, text_output=("BYTES", ["b"]), logprobs=("BYTES", [tokens])))
    assert [alternative.token_id for alternative in response.outputs[0].logprobs[0]] == [5, 1]


def test_empty_final_response_has_no_outputs():
    response = generate_response(_response(True))
    assert response.finished and response.outputs == ()


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("INVALID_ARG: top_p has value 2", errors.BadRequest, "top_p has value 2"),
        ("UNAVAILABLE: 256 requests wait", errors.Overloaded, "256 requests wait"),
        ("CANCELLED: its deadline passed", errors.ClientTimeout, "its deadline passed"),
        ("INTERNAL: oops", errors.ServingError, "oops"),
        ("Stub process 'm_0_0' is not healthy.", errors.ServingError, "Stub process 'm_0_0' is not healthy."),
        ("Request for unknown model: 'x' is not found", errors.NotFound, "Request for unknown model: 'x' is not found"),
        (
            "Request for unknown model: 'x' has no available versions",
            errors.ModelNotReady,
            "Request for unknown model: 'x' has no available versions",
        ),
    ],
)
def test_error_text_becomes_the_exception_that_its_code_names(text, kind, message):
    error = error_from_text(text)
    assert type(error) is kind
    assert str(error) == message
