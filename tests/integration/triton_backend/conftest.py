"""One small real model, exported once; the engine on it; and Hugging Face's own answer to compare with."""

from __future__ import annotations

import queue
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from triton_backend.loading import load_engine
from triton_backend.protocol import GenerateRequest, GenerateResponse
from triton_backend.sampling_params import SamplingParams
from triton_backend.sequence import ResponseSink

END = "<|endoftext|>"
TEXT = [
    "The import statement, combined with the from keyword, finds a module and binds names in the local scope. ",
    "Größe, naïve café, 東京 and Ελλάδα; 🙂🚀👩‍👩‍👧 and 𝒳 are text too. ",
    "for number in range(10):\n    print(number, end=', ')\n",
]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A Llama of 0.3 M random parameters, wide enough in scale that its greedy text varies."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXT * 20, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.4,
        bos_token_id=None,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


ON_GPU = [pytest.param(name, marks=pytest.mark.gpu) for name in ("cuda", "cuda_graphs")]


@pytest.fixture(scope="session", params=["cpu", *ON_GPU])
def version(request, checkpoint, tmp_path_factory) -> Path:
    """In fp32 on CPU; in fp16, the widest that its attention takes, on CUDA, step by step and as captured graphs."""
    from exporters import ExportConfig, export

    out = tmp_path_factory.mktemp("version") / "1"
    options = {}
    if request.param != "cpu":
        options = {"device": "cuda", "precision": "fp16", "engine": {"cuda_graphs": request.param == "cuda_graphs"}}
    export(ExportConfig(str(checkpoint), out, max_num_seqs=8, **options), certify=False)
    return out


def pytest_collection_modifyitems(config, items):
    """Leave out what a GPU does not promise, and all of its tests on a machine without one.

    Its 16 bits do not always choose the original's token, and its kernels sum in an order that depends on the batch.
    """

    if "gpu" in config.option.markexpr and not torch.cuda.is_available():
        raise pytest.UsageError("-m gpu needs a CUDA device and the CUDA build of PyTorch; PyTorch finds none")

    def is_left_out(item) -> bool:
        if not item.get_closest_marker("gpu"):
            return False
        is_exact = item.get_closest_marker("exact") or "original" in item.fixturenames
        return bool(is_exact) or not torch.cuda.is_available()

    config.hook.pytest_deselected(items=[item for item in items if is_left_out(item)])
    items[:] = [item for item in items if not is_left_out(item)]


class Answer(ResponseSink):
    """Collects the responses of one request; can pretend that its client left, or that responses wait to be sent."""

    behind = False

    def __init__(self) -> None:
        self._responses: queue.SimpleQueue[GenerateResponse] = queue.SimpleQueue()
        self.gone = False
        self.num_finals = 0

    def send(self, response: GenerateResponse) -> None:
        self.num_finals += response.finished
        assert self.num_finals <= 1, "a response after the last one"
        self._responses.put(response)

    def is_cancelled(self) -> bool:
        assert self.num_finals == 0, "asked after the last response"
        return self.gone

    def is_behind(self) -> bool:
        return self.behind

    def __iter__(self):
        while True:
            response = self._responses.get(timeout=60)
            yield response
            if response.finished:
                return

    def last(self) -> GenerateResponse:
        return list(self)[-1]


class Client:
    """Requests to a running engine, as model.py makes them."""

    def __init__(self, engine, tokenizer) -> None:
        self.engine = engine
        self.tokenizer = tokenizer

    def submit(self, prompt: str | list[int], stream: bool = False, **params: Any) -> Answer:
        params.setdefault("temperature", 0.0)
        answer = Answer()
        request = GenerateRequest(
            request_id="r",
            params=SamplingParams.from_mapping(params),
            text=prompt if isinstance(prompt, str) else None,
            input_ids=() if isinstance(prompt, str) else tuple(prompt),
            stream=stream,
        )
        self.engine.submit(request, answer)
        return answer

    def ask(self, prompt: str | list[int], **params: Any) -> GenerateResponse:
        return self.submit(prompt, **params).last()

    def ids(self, prompt: str | list[int], **params: Any) -> list[int]:
        response = self.ask(prompt, **params)
        assert response.error is None, response.error
        return list(response.outputs[0].token_ids)


@pytest.fixture(scope="session")
def engine(version):
    engine, _ = load_engine(version)
    yield engine
    engine.stop()


@pytest.fixture(autouse=True)
def integrity_after_every_step(monkeypatch):
    """Rows and requests are whole after every step of every test."""
    from triton_backend.engine import Engine

    step = Engine.step

    def checked_step(self, *args):
        step(self, *args)
        self._scheduler.check_integrity()

    monkeypatch.setattr(Engine, "step", checked_step)


@pytest.fixture
def client(engine, checkpoint):
    yield Client(engine, AutoTokenizer.from_pretrained(checkpoint))
    assert not engine._scheduler.has_work, "a test left requests behind"


@pytest.fixture(scope="session")
def tokenizer(checkpoint):
    return AutoTokenizer.from_pretrained(checkpoint)


@pytest.fixture(scope="session")
def original(checkpoint):
    """Hugging Face ``generate`` on the checkpoint: prompt ids, generation options → new ids."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()

    def generate(prompt_ids: list[int], max_new_tokens: int, **options: Any) -> list[int]:
        with torch.inference_mode():
            output = model.generate(
                torch.tensor([prompt_ids]), max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0, **options
            )
        return output[0, len(prompt_ids) :].tolist()

    generate.model = model
    return generate
