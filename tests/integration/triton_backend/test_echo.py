"""What a prompt's own tokens are said to be, by the engine and through /v1: ``echo`` with ``logprobs``."""

from __future__ import annotations

import pytest
import torch

from control_plane import create_app
from control_plane.auth.services import create_key
from control_plane.extensions import db
from control_plane.registry.places import Place
from control_plane.settings import Settings
from control_plane.triton_fake import FakeTriton
from tests.served import say_loaded, serve

pytestmark = pytest.mark.integration

TEXT = "Größe, naïve café, 東京; 🙂🚀👩‍👧 and 𝒳 are text: import the local scope"


@pytest.fixture
def gateway(client, tmp_path):
    """/v1 with the real engine behind it: body of a completion → its answer, or the error's text."""

    def answers(call):
        prompt = call.text if call.text is not None else list(call.input_ids)
        yield from client.submit(prompt, stream=call.stream, **call.sampling)

    environment = {"LLMOS_HOME": str(tmp_path), "LLMOS_DATABASE_URL": "sqlite://"}
    settings = Settings.from_environment(environment)
    app = create_app(settings, FakeTriton({"tiny": answers}))
    say_loaded(settings, Place("tiny", 1))
    with app.app_context():
        db.create_all()
        serve("tiny")
        key = create_key("test", "developer")

    def complete(**body):
        headers = {"Authorization": f"Bearer {key}"}
        response = app.test_client().post("/v1/completions", json={"model": "tiny", **body}, headers=headers)
        assert response.status_code == 200, response.text
        return response.get_json()

    return complete


def logprobs_of(original, ids: list[int]) -> torch.Tensor:
    """What the original thinks of each token after the first, and its own choices: two rows of numbers."""
    with torch.inference_mode():
        rows = torch.log_softmax(original.model(torch.tensor([ids])).logits[0], dim=-1)[:-1]
    return torch.stack([rows[torch.arange(len(rows)), torch.tensor(ids[1:])], rows.max(dim=-1).values])


def test_the_texts_of_a_prompts_tokens_join_to_the_prompt_and_begin_where_the_tokenizer_says(client, tokenizer):
    encoded = tokenizer(TEXT, return_offsets_mapping=True)
    tokens = client.ask(TEXT, max_tokens=1, prompt_logprobs=0).prompt_tokens
    assert [token.token_id for token in tokens] == encoded["input_ids"]
    assert "".join(token.text for token in tokens) == TEXT
    begins = [sum(len(before.text) for before in tokens[:i]) for i in range(len(tokens))]
    assert begins == [begin for begin, _ in encoded["offset_mapping"]]


def offsets_of(tokenizer, ids: list[int]) -> list[int]:
    """Where each token begins in the text of all, by decoding every beginning; half a character is none yet."""
    beginnings = [tokenizer.decode(ids[:i], skip_special_tokens=True) for i in range(len(ids))]
    return [len(text.rstrip("\ufffd")) for text in beginnings]


@pytest.mark.parametrize("options", [{}, {"beam_width": 3, "n": 3, "logprobs": 0}, {"n": 2, "stop": ["é"]}])
@pytest.mark.parametrize("stream", [False, True])
def test_generated_tokens_begin_where_the_text_before_them_ends(client, tokenizer, options, stream):
    # Characters of several tokens, whole ones only, so that no U+FFFD is meant.
    characters = sorted({i for text in ("🙂", "東", "é", "ab") for i in tokenizer(text)["input_ids"]})
    grammar = {"structured_outputs": {"regex": "[🙂東é京a]{12}"}}
    sampling = {} if "beam_width" in options else {"temperature": 1.0, "seed": 3}
    asked = {"max_tokens": 40, "logprobs": 1, **grammar, **sampling, **options}
    responses = list(client.submit("x", stream=stream, **asked))
    num_outputs = len(responses[-1].outputs)
    for index in range(num_outputs):
        parts = [response.outputs[index] for response in responses]
        ids = [token_id for part in parts for token_id in part.token_ids]
        found = [alternatives[0].text_offset for part in parts for alternatives in part.logprobs]
        assert found == offsets_of(tokenizer, ids)
        assert len(set(ids) & set(characters)) > 2 and len(set(found)) < len(found)


@pytest.mark.parametrize("as_ids", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 5])
def test_echoed_log_probabilities_are_those_of_the_original(gateway, tokenizer, original, as_ids, max_tokens):
    ids = tokenizer(TEXT)["input_ids"]
    body = {"prompt": ids if as_ids else TEXT, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    document = gateway(**body, echo=True, logprobs=1, return_token_ids=True)
    choice = document["choices"][0]
    found = choice["logprobs"]
    assert len(found["tokens"]) == len(ids) + max_tokens == document["usage"]["total_tokens"]
    assert choice["text"].startswith(TEXT) and (choice["text"] == TEXT) == (max_tokens == 0)
    assert choice["prompt_token_ids"] == ids
    assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
    chosen, best = logprobs_of(original, ids + choice["token_ids"]).tolist()
    assert found["token_logprobs"][1:] == pytest.approx(chosen, abs=1e-3)
    assert [max(top.values()) for top in found["top_logprobs"][1:]] == pytest.approx(best, abs=1e-3)
    assert found["text_offset"][: len(ids)] == [
        begin for begin, _ in tokenizer(TEXT, return_offsets_mapping=True)["offset_mapping"]
    ]
    assert found["text_offset"][len(ids) :][:1] == [len(TEXT)][:max_tokens]


@pytest.mark.parametrize("as_ids", [False, True])
def test_truncated_prompt_is_echoed_as_it_was_read(gateway, tokenizer, as_ids):
    ids = tokenizer(TEXT)["input_ids"]
    options = {"truncate_prompt_tokens": 3, "echo": True, "return_token_ids": True, "max_tokens": 0}
    choice = gateway(prompt=ids if as_ids else TEXT, logprobs=0, prompt_logprobs=2, **options)["choices"][0]
    assert choice["prompt_token_ids"] == ids[-3:]
    assert choice["text"] == tokenizer.decode(ids[-3:]) == "".join(choice["logprobs"]["tokens"])
    assert [len(top) for top in choice["logprobs"]["top_logprobs"][1:]] == [1, 1]
    assert [next(iter(top)) for top in choice["prompt_logprobs"][1:]] == [str(i) for i in ids[-2:]]
    assert all({token["rank"] for token in top.values()} >= {1, 2} for top in choice["prompt_logprobs"][1:])


def test_several_prompts_echo_their_own_tokens_for_every_sequence(gateway, tokenizer):
    prompts = [tokenizer(text)["input_ids"] for text in ("The import", "for number in range(10):")]
    body = {"max_tokens": 3, "temperature": 1, "seed": 1, "echo": True, "logprobs": 0, "ignore_eos": True}
    choices = gateway(prompt=prompts, n=2, **body)["choices"]
    alone = [gateway(prompt=[prompt], **body)["choices"][0] for prompt in prompts]
    for choice in choices:
        expected, length = alone[choice["index"] // 2], len(prompts[choice["index"] // 2])
        for name, values in choice["logprobs"].items():
            assert len(values) == length + 3
            assert values[:length] == expected["logprobs"][name][:length]
