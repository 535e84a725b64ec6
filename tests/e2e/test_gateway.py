"""/v1 of a real installation, used as its users do: with the OpenAI client."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from tests.e2e.conftest import Stack, wait_for

pytestmark = pytest.mark.e2e

PROMPT = "The import statement"
LONG = {"max_tokens": 400, "temperature": 0, "extra_body": {"ignore_eos": True}}


@pytest.fixture
def client(stack: Stack) -> Iterator[openai.OpenAI]:
    stack.wait_loaded()
    with openai.OpenAI(base_url=f"{stack.web_url}/v1", api_key=stack.api_key, max_retries=0, timeout=60) as client:
        yield client


def test_models_lists_the_served_model(client: openai.OpenAI, stack: Stack) -> None:
    assert stack.model in [model.id for model in client.models.list()]
    assert client.models.retrieve(stack.model).owned_by == "llmos"


def test_streamed_answer_equals_the_whole_answer(client: openai.OpenAI, stack: Stack) -> None:
    whole = client.completions.create(model=stack.model, prompt=PROMPT, max_tokens=32, temperature=0)
    options = {"include_usage": True}
    chunks = list(
        client.completions.create(
            model=stack.model, prompt=PROMPT, max_tokens=32, temperature=0, stream=True, stream_options=options
        )
    )
    assert len(chunks) > 2
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert whole.usage.completion_tokens <= 32


def test_gateway_and_triton_give_the_same_text(client: openai.OpenAI, stack: Stack) -> None:
    body = {"text_input": PROMPT, "max_tokens": 24, "temperature": 0, "exclude_input_in_output": True}
    direct = httpx.post(f"{stack.http_url}/v2/models/{stack.model}/generate", json=body).json()["text_output"]
    through = client.completions.create(model=stack.model, prompt=PROMPT, max_tokens=24, temperature=0)
    assert through.choices[0].text == direct


def test_several_prompts_are_answered_as_if_alone(client: openai.OpenAI, stack: Stack) -> None:
    prompts = [PROMPT, "A function is", "Lists"]
    together = client.completions.create(model=stack.model, prompt=prompts, max_tokens=12, temperature=0)
    for index, prompt in enumerate(prompts):
        alone = client.completions.create(model=stack.model, prompt=prompt, max_tokens=12, temperature=0)
        assert together.choices[index].text == alone.choices[0].text
        assert together.choices[index].index == index


def test_n_sampled_answers_with_one_seed_are_repeatable(client: openai.OpenAI, stack: Stack) -> None:
    def texts() -> list[str]:
        answer = client.completions.create(model=stack.model, prompt=PROMPT, max_tokens=12, temperature=1, n=3, seed=7)
        return [choice.text for choice in answer.choices]

    first = texts()
    assert len(first) == 3 and first == texts()


def test_streamed_n_answers_are_whole_and_numbered(client: openai.OpenAI, stack: Stack) -> None:
    settings = {"model": stack.model, "prompt": PROMPT, "max_tokens": 12, "temperature": 1, "n": 3, "seed": 7}
    whole = client.completions.create(**settings)
    texts, reasons = ["", "", ""], [None, None, None]
    for chunk in client.completions.create(**settings, stream=True):
        choice = chunk.choices[0]
        assert reasons[choice.index] is None
        texts[choice.index] += choice.text
        reasons[choice.index] = choice.finish_reason
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]


def test_logprobs_of_greedy_tokens_are_the_largest(client: openai.OpenAI, stack: Stack) -> None:
    answer = client.completions.create(model=stack.model, prompt=PROMPT, max_tokens=8, temperature=0, logprobs=3)
    logprobs = answer.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset)
    for chosen, alternatives in zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert chosen == max(alternatives.values())


def test_echo_puts_the_prompt_first(client: openai.OpenAI, stack: Stack) -> None:
    plain = client.completions.create(model=stack.model, prompt=PROMPT, max_tokens=8, temperature=0)
    echoed = client.completions.create(model=stack.model, prompt=PROMPT, max_tokens=8, temperature=0, echo=True)
    assert echoed.choices[0].text == PROMPT + plain.choices[0].text


def test_echoed_prompt_has_the_log_probabilities_that_triton_gives(client: openai.OpenAI, stack: Stack) -> None:
    body = {"text_input": PROMPT, "max_tokens": 1, "temperature": 0, "sampling_parameters": '{"prompt_logprobs": 0}'}
    direct = httpx.post(f"{stack.http_url}/v2/models/{stack.model}/generate", json=body).json()
    expected = [next(iter(token.values()))["logprob"] for token in json.loads(direct["prompt_logprobs"]) if token]
    ids = [token["token_id"] for token in json.loads(direct["prompt_tokens"])]
    for prompt in (PROMPT, ids):
        echoed = client.completions.create(model=stack.model, prompt=prompt, max_tokens=0, echo=True, logprobs=1)
        choice = echoed.choices[0]
        assert choice.text == PROMPT and "".join(choice.logprobs.tokens) == PROMPT
        assert choice.logprobs.token_logprobs[1:] == expected and choice.logprobs.token_logprobs[0] is None
        assert echoed.usage.completion_tokens == 0 and echoed.usage.prompt_tokens == len(ids)


def test_token_ids_in_and_out(client: openai.OpenAI, stack: Stack) -> None:
    answer = client.completions.create(
        model=stack.model, prompt=[5, 6, 7], max_tokens=4, temperature=0, extra_body={"return_token_ids": True}
    )
    assert answer.usage.prompt_tokens == 3
    assert len(answer.choices[0].token_ids) == answer.usage.completion_tokens


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"model": "nope"}, openai.NotFoundError, "nope"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens has value 0"),
        ({"prompt": "word " * 20000}, openai.BadRequestError, "token"),
        ({"prompt": ""}, openai.BadRequestError, "empty"),
        ({"prompt": [2**31 - 1]}, openai.BadRequestError, "2147483647"),
        ({"extra_body": {"logit_bias": {"1": 500}}}, openai.BadRequestError, "logit_bias"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_request_raises_the_clients_own_error(
    client: openai.OpenAI, stack: Stack, stream: bool, values: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        client.completions.create(**{"model": stack.model, "prompt": PROMPT, "max_tokens": 4, **values}, stream=stream)


def test_wrong_key_is_an_authentication_error(stack: Stack) -> None:
    client = openai.OpenAI(base_url=f"{stack.web_url}/v1", api_key="llmos_000000000000_x", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_32_streams_at_once_each_equal_their_solo_run(client: openai.OpenAI, stack: Stack) -> None:
    def run(number: int) -> str:
        prompt = f"{PROMPT} {'and the function ' * (number % 5)}{number}"
        chunks = client.completions.create(
            model=stack.model, prompt=prompt, max_tokens=8 + number, temperature=0, stream=True
        )
        return "".join(chunk.choices[0].text for chunk in chunks)

    solo = [run(number) for number in range(32)]
    together: dict[int, str] = {}
    threads = [threading.Thread(target=lambda n=n: together.update({n: run(n)})) for n in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[number] for number in range(32)] == solo


def engine_metric(stack: Stack, name: str) -> float:
    text = httpx.get(f"http://127.0.0.1:{stack.settings.triton_metrics_port}/metrics").text
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name + "{"))


def test_client_that_leaves_frees_its_row(client: openai.OpenAI, stack: Stack) -> None:
    before = engine_metric(stack, "vllm:generation_tokens_total")
    # Many sequences make the answer slow enough to be left in the middle.
    chunks = client.completions.create(model=stack.model, prompt=PROMPT, stream=True, n=24, **LONG)
    next(iter(chunks))
    chunks.close()
    wait_for(lambda: engine_metric(stack, "vllm:num_requests_running") == 0, 2, "the end of the abandoned request")
    assert engine_metric(stack, "vllm:generation_tokens_total") - before < 24 * LONG["max_tokens"] / 2


def test_health_says_ready_with_the_probes_latency(stack: Stack) -> None:
    stack.wait_loaded()
    report = httpx.get(f"{stack.web_url}/health/ready", timeout=20)
    assert report.status_code == 200
    model = report.json()["models"][stack.model]
    assert model["state"] == "ready" and model["latency_ms"] > 0


def test_index_page_names_the_model_and_its_certificate(stack: Stack) -> None:
    text = httpx.get(stack.web_url, timeout=20).text
    assert stack.model in text and "tokens compared with the original" in text
    assert text.count("badge ready") >= 5


def test_killed_model_process_gives_hung_streams_an_error(client: openai.OpenAI, stack: Stack) -> None:
    pid = stack.stub_pid()
    assert pid is not None
    started = threading.Event()

    def read() -> tuple[set[int], Exception | None]:
        """The sequences that were ended with a reason, and the error."""
        ended: set[int] = set()
        try:
            for chunk in client.completions.create(model=stack.model, prompt=PROMPT, stream=True, n=24, **LONG):
                started.set()
                ended |= {choice.index for choice in chunk.choices if choice.finish_reason}
        except openai.APIError as error:
            return ended, error
        return ended, None

    # More than fits into the batch: whatever a machine's speed, some wait while others are answered.
    with ThreadPoolExecutor(8) as pool:
        answers_read = [pool.submit(read) for _ in range(8)]
        assert started.wait(20)
        os.kill(pid, signal.SIGKILL)
        killed_at = time.monotonic()
        results = [answer.result() for answer in answers_read]
    assert time.monotonic() - killed_at < 15
    lost = [str(error) for _, error in results if error is not None]
    assert lost
    # A process that dies while it holds a lock in shared memory takes Triton 2.51 with it (boost lock_exception); then
    # the stream breaks at once instead of being found lost.
    known = ("lost this request", "does not answer", "in the middle", "is not healthy")
    assert all(any(text in error for text in known) for error in lost), lost
    assert all(len(ended) == 24 for ended, error in results if error is None)
    wait_for(lambda: answers(client, stack), 60, "an answer of the replaced process")


def answers(client: openai.OpenAI, stack: Stack) -> bool:
    try:
        return bool(client.completions.create(model=stack.model, prompt=PROMPT, max_tokens=2).choices)
    except openai.APIError:
        return False
