"""Clients of other servers, unchanged: Triton's vLLM backend (one JSON) and the TensorRT-LLM backend (one tensor per
parameter), each over HTTP and gRPC, in one piece and streamed. All ways give one answer."""

from __future__ import annotations

import json
import queue
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton_grpc

pytestmark = pytest.mark.e2e

PROMPT = "The import statement"
METRICS = {"return_metrics": True}
WAYS = ("generate", "generate_stream", "infer_stream", "infer_stream_of_deltas")
SCHEMA = {
    "type": "object",
    "properties": {
        "keyword": {"enum": ["import", "class", "def"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "flags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    },
    "required": ["keyword", "count", "flags"],
    "additionalProperties": False,
}


class Refused(Exception):
    """The server's own words."""


@dataclass
class Reply:
    """All responses to one request: output name → values, each response's after the other's."""

    responses: list[dict[str, list[Any]]] = field(default_factory=list)

    @property
    def texts(self) -> list[str]:
        deltas = [response["text_output"] for response in self.responses]
        return ["".join(parts) for parts in zip(*deltas, strict=True)]

    def all(self, name: str) -> list[Any]:
        return [value for response in self.responses for value in response.get(name, [])]

    def json(self, name: str) -> Any:
        (document,) = self.all(name)
        return json.loads(document)


class Clients:
    """Sends one request's inputs (name → value or list) in any of the ``WAYS``."""

    def __init__(self, stack) -> None:
        self.model = stack.model
        self.grpc_url = stack.grpc_url
        self.http = httpx.Client(base_url=f"{stack.http_url}/v2/models/{stack.model}", timeout=60)

    def send(self, way: str, inputs: dict[str, Any]) -> Reply:
        inputs = {**inputs, "stream": way in ("generate_stream", "infer_stream_of_deltas")}
        if not inputs["stream"]:
            inputs.setdefault("exclude_input_in_output", True)
        return self._over_http(way, inputs) if way.startswith("generate") else self._over_grpc(inputs)

    def _over_http(self, way: str, inputs: dict[str, Any]) -> Reply:
        response = self.http.post(f"/{way}", json=inputs)
        events = [json.loads(line.removeprefix("data: ")) for line in response.text.split("\n\n") if line]
        if "error" in events[-1]:
            assert response.status_code == 400 or len(events) > 1
            raise Refused(events[-1]["error"])
        as_lists = ({key: one if isinstance(one, list) else [one] for key, one in each.items()} for each in events)
        return Reply(list(as_lists))

    def _over_grpc(self, inputs: dict[str, Any]) -> Reply:
        results: queue.Queue = queue.Queue()
        with triton_grpc.InferenceServerClient(self.grpc_url) as client:
            client.start_stream(lambda result, error: results.put((result, error)))
            client.async_stream_infer(self.model, list(map(tensor, inputs.items())), enable_empty_final_response=True)
            reply = Reply()
            while True:
                result, error = results.get(timeout=60)
                if error is not None:
                    raise Refused(error.message())
                message = result.get_response()
                if message.outputs:
                    values = {output.name: result.as_numpy(output.name).tolist() for output in message.outputs}
                    reply.responses.append({name: list(map(text_of, items)) for name, items in values.items()})
                if message.parameters["triton_final_response"].bool_param:
                    return reply


def tensor(item: tuple[str, Any]) -> triton_grpc.InferInput:
    name, value = item
    values = value if isinstance(value, list) else [value]
    kinds = {
        str: (np.object_, "BYTES"),
        bool: (np.bool_, "BOOL"),
        int: (np.int32, "INT32"),
        float: (np.float32, "FP32"),
    }
    dtype, data_type = (np.uint64, "UINT64") if name == "seed" else kinds[type(values[0])]
    one = triton_grpc.InferInput(name, [len(values)], data_type)
    one.set_data_from_numpy(np.array(values, dtype=dtype))
    return one


def text_of(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value


def vllm(prompt: str = PROMPT, flags: dict[str, bool] | None = None, **parameters: Any) -> dict[str, Any]:
    """As clients of the vLLM backend and genai-perf send it: numbers as strings."""
    numbers = {key: str(one) if type(one) in (int, float) else one for key, one in parameters.items()}
    document = json.dumps({"temperature": "0", **numbers})
    return {"text_input": prompt, "sampling_parameters": document, **(flags or {})}


def trtllm(prompt: str = PROMPT, **parameters: Any) -> dict[str, Any]:
    """As clients of the TensorRT-LLM backend send it; greedy is top_k 1 there."""
    return {"text_input": prompt, "top_k": 1, **parameters}


@pytest.fixture(scope="module")
def clients(stack):
    clients = Clients(stack)
    yield clients
    clients.http.close()


@pytest.fixture(scope="module")
def original(stack):
    """Hugging Face's model and tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(stack.checkpoint).eval(), AutoTokenizer.from_pretrained(
        stack.checkpoint
    )


def generated(original, num_new: int, **options: Any) -> list[str]:
    """What ``generate`` of Hugging Face makes of PROMPT."""
    import torch

    model, tokenizer = original
    inputs = tokenizer(PROMPT, return_tensors="pt")
    with torch.inference_mode():
        rows = model.generate(**inputs, max_new_tokens=num_new, do_sample=False, **options)
    return [tokenizer.decode(ids[inputs["input_ids"].shape[1] :], skip_special_tokens=True) for ids in rows]


@pytest.mark.parametrize("way", WAYS)
def test_both_clients_get_hugging_face_s_greedy_text(clients, original, way):
    expected = generated(original, 24)
    assert clients.send(way, vllm(max_tokens=24)).texts == expected
    assert clients.send(way, trtllm(max_tokens=24)).texts == expected


@pytest.mark.parametrize("way", WAYS)
def test_everything_that_a_vllm_client_may_ask_back_agrees_with_the_text(clients, original, way):
    names = ("finish_reason", "cumulative_logprob", "logprobs", "num_input_tokens", "num_output_tokens")
    flags = {f"return_{name}": True for name in names}
    reply = clients.send(way, vllm(flags=flags, max_tokens=12, temperature=0.8, seed=5, logprobs=2))
    *intermediate, last = reply.all("finish_reason")
    assert set(intermediate) <= {"None"} and last in ("stop", "length")
    assert set(reply.all("num_input_tokens")) == {len(original[1](PROMPT)["input_ids"])}
    tokens = [token for document in reply.all("logprobs") for token in json.loads(document)]
    assert len(tokens) == sum(reply.all("num_output_tokens")) == 12
    assert all(2 <= len(token) <= 3 for token in tokens)
    chosen = [next(iter(token.values())) for token in tokens]
    assert "".join(one["decoded_token"] for one in chosen) == reply.texts[0]
    assert sum(one["logprob"] for one in chosen) == pytest.approx(reply.all("cumulative_logprob")[-1], abs=1e-3)


def test_seeded_samples_are_the_same_for_every_client_and_way(clients):
    sampling = {"max_tokens": 16, "temperature": 0.9, "top_k": 20, "top_p": 0.95, "seed": 2**63 + 5}
    inputs = (vllm(**sampling), trtllm(**sampling))
    assert len({clients.send(way, each).texts[0] for way in WAYS for each in inputs}) == 1
    several = [clients.send(way, vllm(**sampling, n=3)).texts for way in WAYS]
    several += [clients.send(way, trtllm(**sampling, num_return_sequences=3)).texts for way in WAYS]
    assert all(texts == several[0] for texts in several) and len(set(several[0])) == 3


def test_a_whole_form_of_values_that_ask_for_nothing_changes_nothing(clients):
    form = {
        **{"temperature": 1.0, "top_p": 1.0, "repetition_penalty": 1.0, "length_penalty": 1.0, "beam_width": 1},
        **{"presence_penalty": 0.0, "frequency_penalty": 0.0, "min_length": 0, "seed": 0, "end_id": -1, "pad_id": 0},
        **{"stop_words": [""], "bad_words": [""], "num_return_sequences": 1, "return_log_probs": False},
        **{"early_stopping": False, "beam_search_diversity_rate": 0.0, "lora_name": "", "guided_decoding_guide": ""},
    }
    expected = clients.send("generate", trtllm(max_tokens=12)).texts
    for way in WAYS:
        assert clients.send(way, trtllm(max_tokens=12, **form)).texts == expected


@pytest.mark.parametrize("way", WAYS)
def test_beams_are_hugging_face_s_with_scores_that_fall(clients, original, way):
    expected = generated(original, 12, num_beams=4, num_return_sequences=3, length_penalty=0.5)
    beams = {"max_tokens": 12, "length_penalty": 0.5, "beam_width": 4}
    asked = {"return_sequence_scores": True, "return_cumulative_logprob": True, "return_num_output_tokens": True}
    for inputs in (trtllm(**beams, num_return_sequences=3) | asked, vllm(flags=asked, **beams, n=3)):
        reply = clients.send(way, inputs)
        assert reply.texts == expected
        scores, lengths = reply.all("sequence_scores"), reply.all("num_output_tokens")[-3:]
        assert len(scores) == 3 and scores == sorted(scores, reverse=True)
        totals = reply.all("cumulative_logprob")
        assert scores == pytest.approx([t / n**0.5 for t, n in zip(totals, lengths, strict=True)], abs=1e-4)


def test_beams_of_vllm_s_beam_search_are_those_of_beam_width(clients):
    wide = clients.send("generate", trtllm(max_tokens=10, beam_width=4, num_return_sequences=4)).texts
    assert clients.send("infer_stream", vllm(max_tokens=10, use_beam_search=True, n=4)).texts == wide
    assert len(set(wide)) == 4


@pytest.mark.parametrize("way", WAYS)
def test_stop_words_end_the_text_and_bad_words_never_occur(clients, way):
    (plain,) = clients.send("generate", trtllm(max_tokens=40)).texts
    word = re.findall(r"[a-z]{4,}", plain)[2]
    stop = {"max_tokens": 40, "return_finish_reason": True}
    for inputs in (trtllm(**stop, stop_words=["never there", word]), vllm(max_tokens=40, stop=[word])):
        assert clients.send(way, inputs).texts == [plain[: plain.index(word)]]
    assert clients.send(way, trtllm(**stop, stop_words=[word])).all("finish_reason")[-1] == "stop"
    for inputs in (trtllm(max_tokens=40, bad_words=[word, " the"]), vllm(max_tokens=40, bad_words=[word, " the"])):
        (text,) = clients.send(way, inputs).texts
        assert text and word not in text and " the" not in text


def obeys_schema(text: str) -> bool:
    document = json.loads(text)
    assert list(document) == list(SCHEMA["properties"])
    assert document["keyword"] in ("import", "class", "def") and 0 <= document["count"] <= 99
    assert 1 <= len(document["flags"]) <= 3 and all(type(flag) is bool for flag in document["flags"])
    return True


@pytest.mark.parametrize("way", WAYS)
def test_structured_output_obeys_its_schema_however_it_is_asked_for(clients, way):
    guide = {"guided_decoding_guide_type": "json_schema", "guided_decoding_guide": json.dumps(SCHEMA)}
    response_format = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    asked = (
        trtllm(max_tokens=600, **guide),
        vllm(max_tokens=600, guided_json=SCHEMA),
        vllm(max_tokens=600, structured_outputs={"json": SCHEMA}),
        vllm(max_tokens=600, response_format=response_format),
    )
    texts = {clients.send(way, inputs).texts[0] for inputs in asked}
    assert len(texts) == 1 and obeys_schema(texts.pop())
    sampled = {"max_tokens": 600, "temperature": 1.0, "seed": 3}
    assert all(obeys_schema(text) for text in clients.send(way, vllm(**sampled, n=4, guided_json=SCHEMA)).texts)
    for text in clients.send(way, trtllm(max_tokens=600, beam_width=4, num_return_sequences=2, **guide)).texts:
        assert obeys_schema(text)


def test_regexes_choices_and_grammars_are_obeyed(clients):
    def guide(kind: str, text: str) -> dict[str, Any]:
        return {"guided_decoding_guide_type": kind, "guided_decoding_guide": text}

    regex, grammar = r"[0-9]{3}-[a-f]{2}", 'root ::= "yes" | "no" [!?]'
    for inputs in (trtllm(max_tokens=30, **guide("regex", regex)), vllm(max_tokens=30, guided_regex=regex)):
        assert re.fullmatch(regex, clients.send("generate_stream", inputs).texts[0])
    for inputs in (
        trtllm(max_tokens=30, **guide("ebnf_grammar", grammar)),
        vllm(max_tokens=30, guided_grammar=grammar),
    ):
        assert clients.send("infer_stream", inputs).texts[0] in ("yes", "no!", "no?")
    choice = vllm(max_tokens=30, structured_outputs={"choice": ["alpha", "beta"]}, temperature=1.5, seed=1, n=8)
    assert set(clients.send("generate", choice).texts) <= {"alpha", "beta"}


@pytest.mark.parametrize("way", WAYS)
def test_prompt_logprobs_come_once_and_are_those_of_the_original(clients, original, way):
    import torch

    model, tokenizer = original
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        expected = torch.log_softmax(model(ids).logits[0], dim=-1)
    reply = clients.send(way, vllm(max_tokens=6, prompt_logprobs=2))
    first, *others = reply.json("prompt_logprobs")
    assert first is None and len(others) == ids.shape[1] - 1
    for position, token in enumerate(others):
        chosen = token[str(int(ids[0, position + 1]))]
        assert chosen["logprob"] == pytest.approx(float(expected[position, ids[0, position + 1]]), abs=1e-3)


@pytest.mark.parametrize("way", WAYS)
def test_biases_choose_and_forbid_tokens(clients, original, way):
    wanted = original[1]("class")["input_ids"][0]
    biased = vllm(max_tokens=5, logit_bias={str(wanted): 100}, flags={"return_token_ids": True})
    assert clients.send(way, biased).all("output_ids") == [wanted] * 5
    forbidden = vllm(max_tokens=5, logit_bias={str(wanted): "-100"}, flags={"return_token_ids": True})
    assert wanted not in clients.send(way, forbidden).all("output_ids")
    two = vllm(max_tokens=8, temperature=1.0, seed=1, allowed_token_ids=[wanted, wanted + 1])
    found = clients.send(way, two | {"return_token_ids": True}).all("output_ids")
    assert set(found) <= {wanted, wanted + 1}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        (trtllm(lora_name="legal"), "adapter has value 'legal', but this version has no slots for adapters"),
        (vllm(lora_name="../legal"), "adapter has value '../legal', but this version has no slots for adapters"),
        (vllm(max_tokens="many"), 'max_tokens has value "many"; expected a whole number'),
        (vllm(temperature="warm"), 'temperature has value "warm"; expected a number from 0 to 100'),
        (trtllm(beam_width=4, temperature=0.5, top_k=5), "but beams do not sample"),
        (trtllm(beam_width=2, num_return_sequences=4), "n has value 4; expected at most beam_width = 2"),
        (trtllm(guided_decoding_guide="{}"), "guided_decoding_guide_type has value null; expected one of json"),
        (vllm(guided_json={"type": "nothing"}), "the json_schema grammar cannot be used"),
        (vllm(guided_json={}, guided_regex="a", structured_outputs={"regex": "b"}), "are both given; expected one"),
        (vllm(logits_processors=["x"]), "logits_processors has value"),
    ],
)
def test_what_cannot_be_is_refused_in_the_same_words_everywhere(clients, way, inputs, said):
    with pytest.raises(Refused) as refused:
        clients.send(way, inputs)
    assert said in str(refused.value) and "Traceback" not in str(refused.value)


def test_clients_of_all_kinds_in_one_crowd_each_get_what_they_get_alone(clients):
    beams = trtllm(max_tokens=10, beam_width=4, num_return_sequences=2)
    guided = vllm(max_tokens=50, guided_json=SCHEMA)
    kinds = [
        lambda i: vllm(f"Return {i}", max_tokens=8 + i, temperature=0.9, seed=i, n=1 + i % 3),
        lambda i: trtllm("The " * (1 + i), max_tokens=12, bad_words=[" the"]),
        lambda i: beams | {"text_input": f"class {i}"},
        lambda i: guided | {"text_input": f"def {i}"},
    ]
    requests = [(WAYS[i // 4 % 4], kinds[i % 4](i)) for i in range(32)]
    alone = [clients.send(*request).texts for request in requests]
    with ThreadPoolExecutor(32) as pool:
        assert list(pool.map(lambda request: clients.send(*request).texts, requests)) == alone


def test_an_urgent_request_preempts_and_the_other_goes_on_with_the_same_text(clients):
    slow = vllm(max_tokens=120, temperature=1.0, seed=1, n=32, ignore_eos=True, priority=5)
    expected = clients.send("infer_stream", slow).texts
    replies: list[Reply] = []
    thread = threading.Thread(target=lambda: replies.append(clients.send("infer_stream", slow | METRICS)))
    thread.start()
    urgent = vllm(max_tokens=4, priority=-5) | METRICS
    while not replies and (answered := clients.send("generate", urgent).json("request_metrics")):
        assert answered["preemptions"] == 0 and answered["queue_s"] < 1
        time.sleep(0.02)
    thread.join()
    assert replies[0].texts == expected
    assert replies[0].json("request_metrics")["preemptions"] >= 1


def test_request_metrics_tell_of_shared_prefixes(clients):
    prompt = "Return the value of the named attribute of object. " * 4
    first, second = (clients.send("generate_stream", vllm(prompt, max_tokens=3) | METRICS) for _ in range(2))
    assert first.texts == second.texts
    assert second.json("request_metrics")["cached_tokens"] > 16
    assert {"queue_s", "prefill_s", "decode_s", "digest"} <= second.json("request_metrics").keys()
