"""Tokens out of the real Triton: HTTP generate, generate_stream and gRPC, alone and in crowds, and every refusal."""

from __future__ import annotations

import json
import queue
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton_grpc

pytestmark = pytest.mark.e2e

PROMPT = "The import statement"


@pytest.fixture(scope="module")
def http(stack):
    with httpx.Client(base_url=f"{stack.http_url}/v2/models/{stack.model}", timeout=60) as client:
        yield client


def generate(http, **body):
    return http.post("/generate", json={"text_input": PROMPT, "temperature": 0, **body})


def stream(http, **body) -> list[dict]:
    """All events of a generate_stream."""
    events = []
    body = {"text_input": PROMPT, "temperature": 0, "stream": True, **body}
    with http.stream("POST", "/generate_stream", json=body) as response:
        for line in response.iter_lines():
            if line:
                assert line.startswith("data: ")
                events.append(json.loads(line.removeprefix("data: ")))
    return events


@pytest.fixture(scope="module")
def original(stack):
    """Hugging Face's greedy text and ids for a prompt."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(stack.checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(stack.checkpoint)

    def generate_original(prompt: str, max_new_tokens: int) -> tuple[str, list[int]]:
        inputs = tokenizer(prompt, return_tensors="pt")
        with torch.inference_mode():
            ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)[0]
        new_ids = ids[inputs["input_ids"].shape[1] :].tolist()
        return tokenizer.decode(new_ids, skip_special_tokens=True), new_ids

    generate_original.tokenizer = tokenizer
    return generate_original


def test_http_generate_gives_exactly_the_text_of_hugging_face_generate(http, original):
    for prompt in (PROMPT, "Return the", "class object"):
        body = generate(http, text_input=prompt, max_tokens=32, exclude_input_in_output=True).json()
        assert body["text_output"] == original(prompt, 32)[0]


def test_the_prompt_comes_first_unless_excluded(http):
    without = generate(http, max_tokens=8, exclude_input_in_output=True).json()["text_output"]
    assert generate(http, max_tokens=8).json()["text_output"] == PROMPT + without


def test_generate_stream_joined_is_generate(http):
    events = stream(http, max_tokens=32, return_finish_reason=True)
    assert len(events) > 2
    whole = generate(http, max_tokens=32, exclude_input_in_output=True).json()["text_output"]
    assert "".join(event["text_output"] for event in events) == whole
    assert [event["finish_reason"] for event in events[:-1]] == ["None"] * (len(events) - 1)
    assert events[-1]["finish_reason"] in ("stop", "length")


def test_both_dialects_give_the_same_answer(http):
    vllm = generate(
        http,
        temperature=1.0,
        sampling_parameters=json.dumps({"temperature": 0.7, "top_k": "12", "seed": 5, "max_tokens": "20"}),
    ).json()
    # The tensor wins over the JSON, so the first request ran at temperature 1.
    trt = generate(http, temperature=1.0, top_k=12, seed=5, max_tokens=20).json()
    assert vllm["text_output"] == trt["text_output"]


class GrpcStream:
    """One tritonclient stream whose responses are collected."""

    def __init__(self, stack) -> None:
        self.client = triton_grpc.InferenceServerClient(stack.grpc_url)
        self.model = stack.model
        self.responses: queue.Queue = queue.Queue()
        self.client.start_stream(lambda result, error: self.responses.put((result, error)))

    def send(self, text: str | bytes | None = PROMPT, input_ids=None, **parameters) -> None:
        inputs = []
        if input_ids is not None:
            inputs.append(tensor("input_ids", np.array(input_ids, dtype=np.int32), "INT32"))
        elif text is not None:
            inputs.append(tensor("text_input", np.array([text], dtype=np.object_), "BYTES"))
        for name in ("stream", "return_token_ids", "return_finish_reason", "return_logprobs", "return_metrics"):
            if name in parameters:
                inputs.append(tensor(name, np.array([parameters.pop(name)]), "BOOL"))
        document = json.dumps({"temperature": 0, **parameters})
        inputs.append(tensor("sampling_parameters", np.array([document], dtype=np.object_), "BYTES"))
        self.client.async_stream_infer(self.model, inputs, enable_empty_final_response=True)

    def answer(self) -> list:
        """Responses up to the final one; raises the first error."""
        results = []
        while True:
            result, error = self.responses.get(timeout=60)
            if error is not None:
                raise error
            results.append(result)
            if result.get_response().parameters["triton_final_response"].bool_param:
                return results

    def close(self, cancel_requests: bool = False) -> None:
        self.client.stop_stream(cancel_requests=cancel_requests)
        self.client.close()


def tensor(name, array, data_type):
    one = triton_grpc.InferInput(name, list(array.shape), data_type)
    one.set_data_from_numpy(array)
    return one


@pytest.fixture
def grpc_stream(stack):
    opened = GrpcStream(stack)
    yield opened
    opened.close()


def test_grpc_stream_infer_takes_text_and_token_ids_and_returns_both(grpc_stream, original):
    text, ids = original(PROMPT, 16)
    grpc_stream.send(PROMPT, max_tokens=16, stream=True, return_token_ids=True)
    results = grpc_stream.answer()
    assert b"".join(result.as_numpy("text_output")[0] for result in results).decode() == text
    assert np.concatenate([result.as_numpy("output_ids") for result in results]).tolist() == ids

    prompt_ids = original.tokenizer(PROMPT)["input_ids"]
    grpc_stream.send(input_ids=prompt_ids, max_tokens=16, return_token_ids=True)
    (result,) = grpc_stream.answer()
    assert result.as_numpy("output_ids").tolist() == ids


def crowd_request(i: int) -> dict:
    words = "import class return value object string the of and a to in is that".split()  # noqa: SIM905
    prompt = " ".join(words[(i * 7 + j * 3) % len(words)] for j in range(1 + (i * 11) % 90))
    sampling = [{}, {"temperature": 0.9, "seed": i}, {"temperature": 1.0, "top_k": 30, "seed": i}][i % 3]
    return {"text_input": prompt, "max_tokens": 4 + 2 * i, "exclude_input_in_output": True, **sampling}


def test_32_concurrent_requests_of_different_lengths_each_equal_their_solo_run(http):
    requests = [crowd_request(i) for i in range(32)]
    alone = [generate(http, **request).json()["text_output"] for request in requests]
    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(lambda request: generate(http, **request).json()["text_output"], requests))
        streamed = list(
            pool.map(lambda request: "".join(e["text_output"] for e in stream(http, **_no_echo(request))), requests)
        )
    assert together == alone
    assert streamed == alone


def _no_echo(request: dict) -> dict:
    return {key: value for key, value in request.items() if key != "exclude_input_in_output"}


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (
            {"text_input": "word " * 5000},
            r"INVALID_ARG: the prompt has 25000 characters, which are at least \d+ tokens; expected at most \d+ tokens",
        ),
        ({"text_input": ""}, "INVALID_ARG: the prompt is empty"),
        ({"max_tokens": 0}, "max_tokens has value 0; expected a whole number ≥ 1"),
        ({"temperature": -1}, "temperature has value -1.0; expected a number from 0 to 100"),
        ({"top_p": 1.5}, "top_p has value 1.5"),
        ({"min_tokens": 30, "max_tokens": 3}, "min_tokens has value 30"),
        ({"sampling_parameters": "{"}, "sampling_parameters is not valid JSON"),
        ({"sampling_parameters": '{"max_tokens": "many"}'}, 'max_tokens has value "many"'),
        ({"sampling_parameters": '{"logit_bias": {"1": 200}}'}, "logit_bias of token 1 has value 200"),
        ({"beam_width": 4, "top_p": 0.5}, "top_p has value 0.5 and beam_width has value 4, but beams do not sample"),
        ({"sampling_parameters": '{"guided_regex": "(("}'}, "the regex grammar cannot be used: .*unclosed group"),
        ({"lora_name": "legal"}, "adapter has value 'legal', but this version has no slots for adapters"),
        ({"num_return_sequences": 100}, "n has value 100"),
    ],
)
def test_bad_parameters_get_a_clear_error_over_http(http, body, said):
    for response in (generate(http, **body), http.post("/generate_stream", json={"text_input": "x", **body})):
        assert response.status_code == 400
        assert re.search(said, response.text.replace('\\"', '"'))
        assert "Traceback" not in response.text and ".py" not in response.text


def test_values_of_another_json_type_are_refused_before_they_reach_the_engine(http):
    for body in ({"max_tokens": "5"}, {"stream": 1}, {"text_input": 5}, {"temperature": None}):
        assert generate(http, **body).status_code in (400, 500)
    assert generate(http, max_tokens=1).status_code == 200


def test_unknown_parameters_are_tolerated(http):
    plain = generate(http, max_tokens=5).json()["text_output"]
    body = {"max_tokens": 5, "accumulate_tokens": True, "frobnicate": "yes", "sampling_parameters": '{"zap": [1]}'}
    assert generate(http, **body).json()["text_output"] == plain


def test_a_missing_prompt_and_invalid_utf8_are_refused(http, grpc_stream):
    response = http.post("/generate", json={"max_tokens": 3, "temperature": 0, "top_k": 1})
    assert response.status_code == 400 and "text_input is missing" in response.text
    grpc_stream.send(b"\xff\xfe abc")
    with pytest.raises(Exception, match="text_input is not valid UTF-8"):
        grpc_stream.answer()


def test_an_unknown_model_is_named(stack):
    response = httpx.post(f"{stack.http_url}/v2/models/nobody/generate", json={"text_input": "x"})
    assert response.status_code in (400, 404) and "nobody" in response.text


def metrics_text(stack) -> str:
    return httpx.get(f"http://127.0.0.1:{stack.settings.triton_metrics_port}/metrics").text


def running(stack) -> float:
    """The engine's own count of requests that hold cache rows."""
    for line in metrics_text(stack).splitlines():
        if line.startswith("vllm:num_requests_running{") and f'model="{stack.model}"' in line:
            return float(line.rsplit(" ", 1)[1])
    raise AssertionError("no vllm:num_requests_running")


def wait_until(is_true, limit_s: float) -> None:
    started_s = time.monotonic()
    while not is_true():
        assert time.monotonic() - started_s < limit_s
        time.sleep(0.005)


def wait_until_idle(stack, limit_s: float) -> None:
    """Return when no request holds a cache row any more."""
    wait_until(lambda: running(stack) == 0, limit_s)


# Many sequences that each take the sampler's slow path: it runs for seconds, so a test can act in the middle of it.
LONG = {"max_tokens": 400, "ignore_eos": True, "n": 32, "temperature": 1, "repetition_penalty": 1.1, "logprobs": 20}


def test_a_client_gone_mid_stream_frees_its_row_over_http(stack, http):
    parameters = json.dumps(LONG)
    body = {"text_input": PROMPT, "temperature": 0, "stream": True, "sampling_parameters": parameters}
    with http.stream("POST", "/generate_stream", json=body) as response:
        lines = response.iter_lines()  # kept: httpx closes the response with its iterator
        next(lines)
        # The gauge follows the step that sent the first line.
        wait_until(lambda: running(stack) == 1, limit_s=1)
    wait_until_idle(stack, limit_s=1)


def test_a_cancelled_grpc_stream_frees_its_rows(stack):
    opened = GrpcStream(stack)
    for _ in range(2):
        opened.send(stream=True, **LONG)
    opened.responses.get(timeout=10)
    opened.close(cancel_requests=True)
    wait_until_idle(stack, limit_s=1)


def test_a_deadline_is_kept(http):
    response = generate(http, sampling_parameters=json.dumps({**LONG, "timeout_ms": 30}))
    assert response.status_code == 400 and "timeout_ms = 30 has passed" in response.text


def test_more_requests_than_the_queue_holds_are_refused_and_the_others_finish(stack, http):
    results: queue.Queue = queue.Queue()

    def one(opened: GrpcStream, count: int) -> None:
        for _ in range(count):
            opened.send("The", max_tokens=20, ignore_eos=True)
        for _ in range(count):
            _, error = opened.responses.get(timeout=60)
            results.put(str(error) if error else "ok")

    streams = [GrpcStream(stack) for _ in range(4)]
    threads = [threading.Thread(target=one, args=(opened, 150)) for opened in streams]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for opened in streams:
        opened.close()
    outcomes = [results.get() for _ in range(600)]
    refused = [outcome for outcome in outcomes if outcome != "ok"]
    assert outcomes.count("ok") >= 256
    assert all("requests are waiting already (max_queue_size = 256)" in outcome for outcome in refused)
    wait_until_idle(stack, limit_s=1)


def test_every_published_metric_has_values(stack, http):
    from triton_backend.metrics import METRICS

    generate(http, max_tokens=4)
    text = metrics_text(stack)
    assert [spec.name for spec in METRICS if f"\n{spec.name}" not in text] == []
