"""/v1 as OpenAI's clients see it, over a scripted Triton."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest

from control_plane import errors
from control_plane.auth.limits import RateLimits
from control_plane.auth.services import create_key
from control_plane.client import ApiError
from control_plane.registry import serving_state
from control_plane.registry.places import Place
from control_plane.traffic.counts import CLIENT_GONE, OK, outcomes
from control_plane.triton_fake import word_by_word
from tests.served import say_loaded
from triton_backend.protocol import GenerateResponse, SequenceOutput

pytestmark = pytest.mark.unit


def complete(client, **body):
    return client.post("/v1/completions", json={"model": "starter", "prompt": "a b", "max_tokens": 3, **body})


def events(response) -> list:
    assert response.mimetype == "text/event-stream"
    parts = response.get_data(as_text=True).split("\n\n")
    assert parts.pop() == ""
    payloads = [part.removeprefix("data: ") for part in parts]
    return [payload if payload == "[DONE]" else json.loads(payload) for payload in payloads]


def error_of(response) -> dict:
    error = response.get_json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_answer_has_text_finish_reason_and_usage(client):
    document = complete(client).get_json()
    assert document["object"] == "text_completion" and document["id"].startswith("cmpl-")
    assert document["choices"] == [{"index": 0, "text": "w0 w1 w2 ", "logprobs": None, "finish_reason": "length"}]
    assert document["usage"]["prompt_tokens"] == 2
    assert document["usage"]["completion_tokens"] == 3
    assert document["usage"]["total_tokens"] == 5


def test_streamed_deltas_join_to_the_whole_answer(client):
    *chunks, done = events(complete(client, stream=True))
    assert done == "[DONE]"
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "w0 w1 w2 "
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, "length"]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)


def test_usage_comes_in_a_last_chunk_when_asked_for(client):
    *chunks, last, _ = events(complete(client, stream=True, stream_options={"include_usage": True}))
    assert last["choices"] == [] and last["usage"]["total_tokens"] == 5
    assert all(chunk["usage"] is None for chunk in chunks)


def test_usage_grows_with_every_chunk_when_asked_for(client):
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, _ = events(complete(client, stream=True, stream_options=options))
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3, 3]


def test_choices_of_several_prompts_are_numbered_prompt_major(client, triton):
    document = complete(client, prompt=["a", "b c"], n=2).get_json()
    assert [choice["index"] for choice in document["choices"]] == [0, 1, 2, 3]
    assert document["usage"]["prompt_tokens"] == 3
    assert document["usage"]["completion_tokens"] == 12
    assert [call.text for call in triton.calls] == ["a", "b c"]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [([1, 2, 3], [(1, 2, 3)]), ([[1], [2, 3]], [(1,), (2, 3)])],
)
def test_token_ids_are_passed_as_token_ids(client, triton, prompt, expected):
    assert complete(client, prompt=prompt).status_code == 200
    assert [call.input_ids for call in triton.calls] == expected


def test_beams_grammars_and_adapters_reach_the_engine(client, triton):
    wanted = {
        "use_beam_search": True,
        "n": 2,
        "length_penalty": 0.5,
        "response_format": {"type": "json_object"},
        "lora_name": "legal",
        "logit_bias": {"5": 1},
    }
    complete(client, **wanted)
    assert triton.calls[0].sampling == {"max_tokens": 3, **wanted}


def test_only_what_the_client_named_reaches_the_engine(client, triton):
    complete(client, temperature=0, top_k=5, stop=None, seed=None, user="me", unknown={"x": 1}, logit_bias=None)
    assert triton.calls[0].sampling == {"max_tokens": 3, "temperature": 0, "top_k": 5}


def test_max_completion_tokens_is_another_name_for_max_tokens(client, triton):
    complete(client, max_tokens=None, max_completion_tokens=2)
    assert triton.calls[0].sampling == {"max_tokens": 2}


def test_echo_puts_the_prompt_before_every_choice(client):
    assert [c["text"] for c in complete(client, echo=True, n=2).get_json()["choices"]] == ["a bw0 w1 w2 "] * 2
    *chunks, _ = events(complete(client, echo=True, stream=True))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "a bw0 w1 w2 "


def test_logprobs_have_openais_four_parallel_lists(client):
    whole = complete(client, logprobs=1).get_json()["choices"][0]["logprobs"]
    assert whole["tokens"] == ["w0 ", "w1 ", "w2 "]
    assert whole["token_logprobs"] == [-0.5] * 3
    assert whole["top_logprobs"][0] == {"w0 ": -0.5, "other": -1.5}
    assert whole["text_offset"] == [0, 3, 6]
    *chunks, _ = events(complete(client, logprobs=1, stream=True))
    assert [offset for chunk in chunks for offset in chunk["choices"][0]["logprobs"]["text_offset"]] == [0, 3, 6]


def test_echo_with_logprobs_tells_of_the_prompts_tokens_first(client, triton):
    choice = complete(client, prompt="one 🙂 two", echo=True, logprobs=1, max_tokens=2).get_json()["choices"][0]
    assert choice["text"] == "one 🙂 twow0 w1 "
    assert choice["logprobs"]["tokens"] == ["one", "\ufffd", " 🙂", " two", "w0 ", "w1 "]
    assert choice["logprobs"]["token_logprobs"] == [None, -0.25, -0.25, -0.25, -0.5, -0.5]
    assert choice["logprobs"]["top_logprobs"][:2] == [None, {"\ufffd": -0.25, "other1": -1}]
    assert choice["logprobs"]["text_offset"] == [0, 3, 3, 5, 9, 12]
    sampling = {"max_tokens": 2, "logprobs": 1, "prompt_logprobs": 1, "return_prompt_tokens": True}
    assert triton.calls[0].sampling == sampling


def test_streamed_echo_with_logprobs_joins_to_the_whole_answer(client):
    body = {"echo": True, "logprobs": 0, "n": 2, "prompt": ["a b", "c"]}
    whole = complete(client, **body).get_json()["choices"]
    *chunks, _ = events(complete(client, stream=True, **body))
    for expected in whole:
        parts = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == expected["index"]]
        assert "".join(part["text"] for part in parts) == expected["text"]
        for name, values in expected["logprobs"].items():
            assert [value for part in parts for value in part["logprobs"][name]] == values


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_max_tokens_0_gives_the_prompt_only(client, triton, stream):
    response = complete(
        client, echo=True, logprobs=1, max_tokens=0, stream=stream, stream_options={"include_usage": True}
    )
    documents = events(response)[:-1] if stream else [response.get_json()]
    choice = documents[0]["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("a b", "length")
    assert choice["logprobs"]["tokens"] == ["a", " b"] and choice["logprobs"]["text_offset"] == [0, 1]
    assert documents[-1]["usage"]["prompt_tokens"] == 2 and documents[-1]["usage"]["completion_tokens"] == 0
    assert triton.calls[0].sampling["max_tokens"] == 1


@pytest.mark.parametrize("stream", [False, True])
def test_echo_of_token_ids_reads_them_aloud(client, triton, stream):
    response = complete(client, prompt=[[7, 8], [9]], echo=True, max_tokens=0, stream=stream)
    choices = [e["choices"][0] for e in events(response)[:-1]] if stream else response.get_json()["choices"]
    assert [(choice["text"], choice["logprobs"]) for choice in choices] == [("t7 t8 ", None), ("t9 ", None)]
    scored = complete(client, prompt=[7, 8], echo=True, logprobs=1, max_completion_tokens=0, max_tokens=None)
    assert scored.get_json()["choices"][0]["logprobs"]["token_logprobs"] == [None, -0.25]


@pytest.mark.parametrize("options", [{"logprobs": 1}, {}])
def test_echo_of_a_truncated_prompt_is_what_the_engine_read(client, triton, options):
    def truncated(call):
        yield from word_by_word(replace(call, text=call.text.split()[-1]))

    triton.models["starter"] = truncated
    choice = complete(client, prompt="one two", echo=True, truncate_prompt_tokens=1, **options).get_json()["choices"][0]
    assert choice["text"] == "twow0 w1 w2 "
    if options:
        assert choice["logprobs"]["tokens"] == ["two", "w0 ", "w1 ", "w2 "]
        assert choice["logprobs"]["text_offset"] == [0, 3, 6, 9]


def test_prompt_logprobs_are_vllms_list(client):
    first, *others = complete(client, prompt_logprobs=1, n=2).get_json()["choices"][1]["prompt_logprobs"]
    assert first is None
    chosen, likeliest = {"logprob": -0.25, "rank": 4, "decoded_token": " b"}, {"logprob": -1.0, "rank": 1}
    assert others == [{"1": chosen, "1001": {**likeliest, "decoded_token": "other1"}}]
    *chunks, _ = events(complete(client, prompt_logprobs=1, stream=True))
    assert [len(chunk["choices"][0].get("prompt_logprobs", [])) for chunk in chunks] == [2, 0, 0]


@pytest.mark.parametrize("value", [-1, 65, True, "1"])
def test_prompt_logprobs_that_are_no_number_of_them_are_refused(client, value):
    answer = complete(client, prompt_logprobs=value)
    assert answer.status_code == 400 and "prompt_logprobs" in answer.get_json()["error"]["message"]


def test_echo_and_prompt_logprobs_each_show_as_many_as_were_asked_for(client):
    choice = complete(client, echo=True, logprobs=0, prompt_logprobs=2).get_json()["choices"][0]
    assert choice["logprobs"]["top_logprobs"][1] == {" b": -0.25}
    assert list(choice["prompt_logprobs"][1]) == ["1", "1001", "1002"]


@pytest.mark.parametrize(("prompt", "ids"), [("a b", [0, 1]), ([7, 8, 9], [7, 8, 9])])
def test_token_ids_are_returned_when_asked_for_those_of_the_prompt_once(client, prompt, ids):
    choice = complete(client, prompt=prompt, return_token_ids=True).get_json()["choices"][0]
    assert (choice["token_ids"], choice["prompt_token_ids"]) == ([0, 1, 2], ids)
    *chunks, _ = events(complete(client, prompt=prompt, return_token_ids=True, stream=True))
    assert [chunk["choices"][0]["token_ids"] for chunk in chunks] == [[0], [1], [2]]
    assert [chunk["choices"][0].get("prompt_token_ids") for chunk in chunks] == [ids, None, None]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"prompt": 3}, "prompt has value 3; expected a string, a list of 1 to 256 strings"),
        ({"prompt": []}, "prompt has value []; expected a string"),
        ({"prompt": ["a", 1]}, 'prompt has value ["a", 1]; expected'),
        ({"prompt": [True]}, "prompt has value [true]; expected"),
        ({"prompt": [-1]}, "prompt has value [-1]; expected"),
        ({"model": 5}, "model has value 5; expected a valid string"),
        ({"stream": "yes"}, 'stream has value "yes"; expected a valid boolean'),
        ({"logprobs": 6}, "logprobs has value 6; expected less than or equal to 5"),
        ({"logprobs": "2"}, 'logprobs has value "2"; expected a valid integer'),
        ({"max_tokens": 0}, "max_tokens has value 0; expected a whole number ≥ 1"),
        ({"temperature": "hot"}, 'temperature has value "hot"; expected a number from 0 to 100'),
        ({"temperature": -1}, "temperature has value -1; expected a number from 0 to 100"),
        ({"top_p": 1.5}, "top_p has value 1.5; expected a number from 0 to 1"),
        ({"n": 0}, "n has value 0; expected a whole number from 1 to 128"),
        ({"stop": 5}, "stop has value 5; expected a string or a list"),
        ({"min_tokens": 9}, "min_tokens has value 9; expected at most max_tokens = 3"),
        ({"best_of": 1, "n": 2}, "best_of has value 1; expected at least n = 2"),
        ({"suffix": "x"}, 'suffix has value "x", but'),
        ({"logit_bias": {"5": 101}}, "logit_bias of token 5 has value 101; expected a number from -100 to 100"),
        ({"add_special_tokens": False}, "add_special_tokens has value false, but"),
        ({"use_beam_search": True, "n": 4, "top_p": 0.5}, "top_p has value 0.5 and beam_width has value 4, but beams"),
        ({"response_format": {"type": "xml"}}, 'response_format.type has value "xml"; expected "text", "json_object"'),
        ({"echo": True, "logprobs": 1, "max_tokens": -1}, "max_tokens has value -1; expected a whole number ≥ 1"),
        ({"echo": True, "logprobs": 1, "decoder_input_ids": [1]}, "decoder_input_ids and echo are both given"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage has value 1; expected a valid"),
        ({"stream_options": 1}, "stream_options has value 1; expected"),
    ],
)
def test_bad_value_is_refused_naming_field_value_and_expectation(client, triton, body, message):
    response = complete(client, **body)
    assert response.status_code == 400
    assert error_of(response)["message"].startswith(message)
    assert triton.calls == []


def test_what_a_models_own_defaults_make_right_is_accepted(client, triton):
    groups = {"num_beam_groups": 2, "diversity_penalty": 0.5}
    refusal = complete(client, **groups)
    assert error_of(refusal)["message"] == "num_beam_groups has value 2; expected a divisor of beam_width = 1"
    triton.generation_defaults = {"beam_width": 4}
    assert complete(client, **groups).status_code == 200


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body is not valid JSON"),
        (b"{", "the body is not valid JSON"),
        (b"[1]", "the body is a JSON list; expected an object"),
        (b'{"model": "\xff"}', "the body is not valid UTF-8 text"),
        (b'{"model": "starter", "prompt": "\\ud83d"}', "the body is not valid UTF-8 text"),
        (b'{"model": "starter"}', "prompt is missing"),
        (b'{"prompt": "x"}', "model is missing"),
        (b"[" * 60000, "the body is not valid JSON"),
    ],
)
def test_body_that_is_no_request_is_refused(client, body, message):
    response = client.post("/v1/completions", data=body)
    assert response.status_code == 400
    assert error_of(response)["message"].startswith(message)


@pytest.mark.parametrize(
    "values",
    [
        {"n": 2, "best_of": 2},
        {"best_of": 1},
        {"logit_bias": {}},
        {"suffix": ""},
        {"prompt_logprobs": None},
        {"add_special_tokens": True},
        {"stream": None, "echo": None, "logprobs": None, "stream_options": None},
    ],
)
def test_value_that_asks_for_nothing_is_accepted(client, values):
    assert complete(client, **values).status_code == 200


@pytest.mark.parametrize("name", ["nope", "a/b", "..", "x" * 300, "", "starter\x00", "ѕtarter"])
def test_unknown_model_is_404(client, name):
    response = complete(client, model=name)
    assert response.status_code == 404
    assert error_of(response)["code"] == "not_found"


def test_installed_model_that_is_not_loaded_is_503_not_404(client, triton):
    triton.unload("starter")
    response = complete(client)
    assert response.status_code == 503
    assert error_of(response)["code"] == "model_not_ready"
    assert response.headers["Retry-After"] == "1"


def _failing(error, num_before=0):
    def script(call):
        for _, response in zip(range(num_before), word_by_word(call), strict=False):
            yield response
        raise error

    return script


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (errors.BadRequest("the prompt is too long"), 400, "invalid_request"),
        (errors.Overloaded("256 requests wait"), 503, "overloaded"),
        (errors.ServingError("its process was replaced"), 502, "serving_error"),
        (errors.TritonUnavailable("Triton does not answer"), 503, "triton_unavailable"),
        (errors.RequestTimeout("too slow"), 504, "timeout"),
        (errors.ClientTimeout("timeout_ms = 5 has passed"), 504, "client_timeout"),
    ],
)
def test_error_before_the_first_token_has_its_own_status(client, triton, stream, error, status, code):
    triton.models["starter"] = _failing(error)
    response = complete(client, stream=stream)
    assert response.status_code == status
    assert error_of(response)["code"] == code
    assert ("Retry-After" in response.headers) == (status == 503)


def test_error_in_the_middle_of_a_stream_is_its_last_event(client, triton):
    triton.models["starter"] = _failing(errors.ServingError("lost"), num_before=2)
    *chunks, last = events(complete(client, stream=True))
    assert len(chunks) == 2
    assert last["error"]["message"] == "lost"


@pytest.mark.parametrize(("stream", "num_before"), [(False, 0), (True, 0), (True, 2)])
def test_answer_that_ends_without_a_reason_is_an_error(client, triton, stream, num_before):
    """As a model process leaves it that dies: Triton ends the stream as if it were complete."""

    def cut(call):
        for _, response in zip(range(num_before), word_by_word(call), strict=False):
            yield response
        yield GenerateResponse(call.request_id, finished=True)

    triton.models["starter"] = cut
    response = complete(client, stream=stream)
    assert response.status_code == (200 if num_before else 502)
    error = events(response)[-1]["error"] if num_before else error_of(response)
    assert error["code"] == "serving_error" and "in the middle" in error["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_fewer_texts_than_were_asked_for_are_no_error(client, triton, stream):
    """As when a grammar allows fewer than there are beams."""
    triton.models["starter"] = lambda call: word_by_word(replace(call, sampling={**call.sampling, "n": 2}))
    answer = complete(client, n=3, stream=stream, max_tokens=4)
    assert answer.status_code == 200
    chunks = events(answer)[:-1] if stream else [answer.get_json()]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    ended = {choice["index"]: choice["finish_reason"] for choice in choices if choice["finish_reason"]}
    assert ended == {0: "length", 1: "length", 2: "stop"}


def test_our_own_mistake_is_not_explained_to_the_client(client, triton):
    triton.models["starter"] = _failing(KeyError("secret path"), num_before=1)
    last = events(complete(client, stream=True))[-1]
    assert "secret" not in last["error"]["message"]
    response = complete(client)
    assert response.status_code == 500
    assert "secret" not in response.get_data(as_text=True)


def test_closed_response_cancels_the_request(client, triton):
    response = complete(client, stream=True, max_tokens=50)
    next(response.iter_encoded())
    response.close()
    assert triton.num_cancelled == 1


def test_finished_request_is_not_cancelled(client, triton):
    events(complete(client, stream=True))
    complete(client)
    assert triton.num_cancelled == 0


@pytest.fixture
def charges(monkeypatch):
    """Tokens that each request is charged for."""
    found: list[int] = []
    monkeypatch.setattr(RateLimits, "spend_tokens", lambda limits, principal, num_tokens: found.append(num_tokens))
    return found


def test_candidates_that_are_not_returned_are_charged(client, charges):
    with complete(client, n=2, best_of=8) as response:
        assert response.get_json()["usage"]["completion_tokens"] == 6
    with complete(client, beam_width=4):
        assert charges == [2 + 8 * 3]
    assert charges[1:] == [2 + 4 * 3]


@pytest.mark.parametrize("error", [errors.ClientGone("left"), errors.ClientTimeout("late"), errors.RequestTimeout("")])
def test_answer_that_nobody_waited_for_is_charged(client, triton, charges, error):
    triton.models["starter"] = _failing(error)
    complete(client, prompt="twelve chars", best_of=2)
    complete(client, prompt=[[1, 2], [3]], stream=True)
    assert charges == [(3 + 1) + 2 * 3, (2 + 3) + (1 + 3)]


def test_refused_and_failed_requests_are_not_charged(client, triton, charges):
    for error in (errors.BadRequest("no"), errors.Overloaded("full"), errors.ServingError("died")):
        triton.models["starter"] = _failing(error)
        complete(client)
    assert charges == [0, 0, 0]


@pytest.mark.parametrize(("num_read", "outcome"), [(2, CLIENT_GONE), (3, OK)])
def test_stream_whose_last_token_was_read_is_an_answer(app, client, num_read, outcome):
    response = complete(client, stream=True)
    chunks = response.iter_encoded()
    for _ in range(num_read):
        next(chunks)
    response.close()
    (counts,) = app.extensions["traffic"].totals().values()
    assert outcomes(counts) == {outcome: 1}


def test_completions_leave_web_threads_for_health(app, client):
    slots = app.extensions["completion_slots"]
    taken = 0
    while slots.acquire(blocking=False):
        taken += 1
    events = app.extensions["event_stream_slots"]
    while events.acquire(blocking=False):
        taken += 1
    assert taken == app.config["SETTINGS"].web_threads - 4
    assert complete(client).status_code == 503
    assert client.get("/health/live").status_code == 200
    slots.release()
    for stream in (False, True) * 2:
        with complete(client, stream=stream) as response:
            assert response.status_code == 200


def test_models_lists_what_triton_has_ready(client, triton):
    document = client.get("/v1/models").get_json()
    assert [model["id"] for model in document["data"]] == ["starter"]
    assert document["data"][0]["created"] > 0
    assert client.get("/v1/models/starter").get_json() == document["data"][0]
    assert client.get("/v1/models/nope").status_code == 404
    assert client.get("/v1/models/starter@3").get_json()["id"] == "starter@3"


def test_models_lists_nothing_that_is_not_loaded(client, settings):
    serving_state.write(settings, serving_state.ServingState())
    assert client.get("/v1/models").get_json()["data"] == []
    assert client.get("/v1/models/starter").status_code == 503


def test_answer_says_which_version_it_is_of_and_names_may_ask_for_one(client, triton):
    for name in ("starter", "starter@3", "starter@production"):
        for stream in (False, True):
            response = complete(client, model=name, stream=stream)
            assert response.headers["X-Model-Version"] == "3"
    assert {(call.model, call.version) for call in triton.calls} == {("starter", 3)}
    assert complete(client, model="starter@4").status_code == 404


def test_version_that_moves_just_then_is_found_where_it_is(client, triton, settings):
    triton.models["starter.canary"], triton.versions["starter.canary"] = triton.models.pop("starter"), [3]
    moved = Place("starter.canary", 3)

    def unloaded(call):
        say_loaded(settings, moved)
        raise errors.ModelNotReady("Request for unknown model: 'starter' version 3 is not at ready state")

    triton.models["starter"] = unloaded
    for stream in (False, True):
        say_loaded(settings, Place("starter", 3))
        time.sleep(0.25)
        assert complete(client, stream=stream).status_code == 200
    assert triton.calls[-1].model == "starter.canary"


def test_request_without_a_key_is_401_in_openais_shape(app):
    for header in ("", "Basic x", "Bearer", "Bearer llmos_a_b"):
        response = app.test_client().post("/v1/completions", json={}, headers={"Authorization": header})
        assert response.status_code == 401
        assert error_of(response)["code"] == "invalid_api_key"
        assert response.headers["WWW-Authenticate"] == "Bearer"


def test_role_below_developer_may_list_but_not_generate(app):
    with app.app_context():
        headers = {"Authorization": f"Bearer {create_key('eyes', 'viewer')}"}
    viewer = app.test_client()
    assert viewer.get("/v1/models", headers=headers).status_code == 200
    response = viewer.post("/v1/completions", json={"model": "starter", "prompt": "x"}, headers=headers)
    assert response.status_code == 403
    assert error_of(response)["code"] == "forbidden"


def test_body_over_the_limit_is_413_in_json(client, settings):
    response = client.post("/v1/completions", data=b"x" * (settings.request_limit_bytes + 1))
    assert response.status_code == 413
    assert f"at most {settings.request_limit_bytes} bytes" in error_of(response)["message"]


def test_request_id_is_echoed_or_made(client):
    assert client.get("/health", headers={"X-Request-Id": "abc-1"}).headers["X-Request-Id"] == "abc-1"
    assert len(client.get("/health").headers["X-Request-Id"]) == 32
    hostile = client.get("/health", headers={"X-Request-Id": "x" * 500})
    assert len(hostile.headers["X-Request-Id"]) == 32


def test_unknown_path_and_wrong_method_are_json(client):
    assert error_of(client.get("/v1/nope"))["code"] == "not_found"
    wrong = client.get("/v1/completions")
    assert wrong.status_code == 405 and "POST" in wrong.headers["Allow"]


def test_the_client_of_the_control_plane_reads_answers_as_they_come(admin, triton):
    words = "first\u2028second\x85 🙂"

    def lines(call):
        yield GenerateResponse(call.request_id, (SequenceOutput(0, words),), 2)
        yield GenerateResponse(call.request_id, (SequenceOutput(0, " end", finish_reason="stop"),), 2, finished=True)

    triton.models["starter"] = lines
    assert list(admin.complete("starter@production", "a b", temperature=0)) == [words, " end"]
    assert "".join(admin.complete("starter", "a b", stream=False)) == f"{words} end"
    with pytest.raises(ApiError, match="nosuch") as refused:
        list(admin.complete("nosuch", "a b"))
    assert refused.value.status == 404

    def broken(call):
        yield GenerateResponse(call.request_id, (SequenceOutput(0, words),), 2)
        raise errors.ServingError("the model died")

    triton.models["starter"] = broken
    with pytest.raises(ApiError, match="the model died"):
        list(admin.complete("starter", "a b"))
