"""Adapters by name: every request follows its own, whatever its batch-mates use and however few slots there are."""

from __future__ import annotations

import contextlib
import json
import shutil

import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from triton_backend import version_folder
from triton_backend.adapter_manager import AdapterManager, AdapterRef
from triton_backend.adapter_store import AdapterStore
from triton_backend.errors import InvalidRequest
from triton_backend.loading import load_engine

from .conftest import Client
from .test_version_kinds import NUM_SLOTS, RANK, adapter_of, prompt_of
from .tiny_graphs import TinyModel, lora_config, write_version

pytestmark = pytest.mark.integration

NAMES = ("a", "b", "c", "d")


def write_adapter(folder, seed: int, base: str = "") -> None:
    """An adapter folder as ``exporters.adapters`` makes it."""
    folder.mkdir(parents=True)
    save_file(adapter_of(seed), folder / "adapter.safetensors")
    facts = {"format": 1, "name": folder.name, "rank": RANK, "targets": [], "base": {"digest": base, "checkpoint": ""}}
    (folder / "adapter.json").write_text(json.dumps(facts))
    version_folder.seal(folder, {}, {})


@pytest.fixture(scope="module")
def model(tokenizer) -> TinyModel:
    return TinyModel(len(tokenizer))


@pytest.fixture(scope="module")
def directory(model, checkpoint, tmp_path_factory):
    """A model directory: version 1 with two slots, and four adapters."""
    directory = tmp_path_factory.mktemp("model")
    write_version(directory / "1", model, checkpoint, lora=lora_config(NUM_SLOTS, RANK))
    for seed, name in enumerate(NAMES):
        write_adapter(directory / "adapters" / name, seed)
    return directory


@pytest.fixture
def client(directory, tokenizer):
    engine, _ = load_engine(directory / "1", is_sealed=False)
    yield Client(engine, tokenizer)
    assert not engine._scheduler.has_work, "a test left requests behind"
    engine.stop()


def expected(model, prompt, num_new, name):
    adapter = adapter_of(NAMES.index(name)) if name else None
    return model.greedy(prompt, num_new, adapter=adapter)


def test_more_adapters_than_slots_at_once_are_all_answered_right(client, model):
    names = [None, *NAMES] * 5
    prompts = [prompt_of(i, 5 + i) for i in range(len(names))]
    answers = [
        client.submit(prompt, max_tokens=12, ignore_eos=True, adapter=name)
        for prompt, name in zip(prompts, names, strict=True)
    ]
    for answer, prompt, name in zip(answers, prompts, names, strict=True):
        response = answer.last()
        assert response.error is None, response.error
        assert list(response.outputs[0].token_ids) == expected(model, prompt, 12, name)


def test_the_same_prompt_is_never_shared_between_adapters(client, model):
    prompt = prompt_of(3, 40)
    for name in (None, "a", "b", "a", None):
        assert client.ids(prompt, max_tokens=8, ignore_eos=True, adapter=name) == expected(model, prompt, 8, name)
    assert client.ask(prompt, max_tokens=1, adapter="a").metrics["cached_tokens"] == 39


def test_beams_and_several_sequences_follow_the_adapter(client):
    plain, adapted = (client.ask([5, 6, 7], beam_width=3, max_tokens=10, adapter=name).outputs for name in (None, "c"))
    assert plain[0].token_ids != adapted[0].token_ids
    sampled = client.ask([5, 6, 7], n=3, max_tokens=10, temperature=0.0, adapter="c").outputs
    assert len({output.token_ids for output in sampled}) == 1


@pytest.mark.parametrize(
    "name", ["e", "../a", "a/../b", "a\0", "a" * 128, "Å", ".", "%2e", "\N{CYRILLIC SMALL LETTER A}", "１"]
)
def test_an_unknown_adapter_is_refused_with_those_that_exist(client, name):
    with pytest.raises(InvalidRequest, match="this model has a, b, c, d"):
        client.ask([5], adapter=name)


@pytest.mark.parametrize("name", ["a" * 300, "a\ud800", 5, ["a"]])
def test_a_name_that_is_no_name_is_refused(client, name):
    with pytest.raises(InvalidRequest, match=r"^INVALID_ARG: adapter has "):
        client.ask([5], adapter=name)


def test_an_empty_name_asks_for_no_adapter(client, model):
    assert client.ids([5, 6], max_tokens=6, ignore_eos=True, adapter="") == expected(model, [5, 6], 6, None)


def test_a_version_without_slots_says_so(engine, checkpoint):
    with pytest.raises(InvalidRequest, match="has no slots for adapters; export it with --lora-slots"):
        Client(engine, AutoTokenizer.from_pretrained(checkpoint)).ask([5], adapter="a")


def test_an_adapter_that_vanishes_while_its_request_waits_ends_that_request_alone(client, directory, model):
    write_adapter(directory / "adapters" / "z", 9)
    running = [client.submit([5, i], max_tokens=50, ignore_eos=True, adapter=name) for i, name in enumerate("ab")]
    lost = client.submit([5, 6], max_tokens=5, adapter="z")  # both slots are in use
    shutil.rmtree(directory / "adapters" / "z")
    assert "adapter 'z' cannot be read" in lost.last().error
    for i, answer in enumerate(running):
        assert list(answer.last().outputs[0].token_ids) == expected(model, [5, i], 50, "ab"[i])
    assert client.ids([5, 1], max_tokens=5, ignore_eos=True, adapter="c") == expected(model, [5, 1], 5, "c")


def test_a_step_that_failed_leaves_no_wrong_adapter_behind(client, model, monkeypatch):
    prompt = prompt_of(4, 40)
    assert client.ids(prompt, max_tokens=9, ignore_eos=True, adapter="a") == expected(model, prompt, 9, "a")
    assert client.ids(prompt, max_tokens=9, ignore_eos=True, adapter="b") == expected(model, prompt, 9, "b")

    def broken(*args):
        raise RuntimeError("no memory")

    for method in ("load_adapter", "copy_tokens"):
        with monkeypatch.context() as patch:
            patch.setattr(client.engine._runner, method, broken)
            client.ask(prompt, max_tokens=9, adapter="c")
        for name in ("c", "a", "b"):
            assert client.ids(prompt, max_tokens=9, ignore_eos=True, adapter=name) == expected(model, prompt, 9, name)


def test_matrices_of_another_type_are_refused(client, directory):
    folder = directory / "adapters" / "x"
    write_adapter(folder, 0)
    save_file(
        {name: matrix.astype(np.float16) for name, matrix in adapter_of(0).items()}, folder / "adapter.safetensors"
    )
    (folder / "manifest.json").unlink()
    version_folder.seal(folder, {}, {})
    assert "has type float16; this model expects float32" in client.ask([5], max_tokens=2, adapter="x").error
    shutil.rmtree(folder)


def test_a_replaced_adapter_is_another_one(client, directory, model):
    folder = directory / "adapters" / "y"
    write_adapter(folder, 0)
    assert client.ids([5, 1], max_tokens=9, ignore_eos=True, adapter="y") == expected(model, [5, 1], 9, "a")
    shutil.rmtree(folder)
    write_adapter(folder, 1)
    assert client.ids([5, 1], max_tokens=9, ignore_eos=True, adapter="y") == expected(model, [5, 1], 9, "b")
    shutil.rmtree(folder)


def test_damaged_and_foreign_adapters_are_refused_by_name(tmp_path):
    write_adapter(tmp_path / "bad", 1)
    (tmp_path / "bad" / "adapter.safetensors").write_bytes(b"x")
    write_adapter(tmp_path / "foreign", 1, base="f" * 64)
    write_adapter(tmp_path / "mine", 1, base="e" * 64)
    store = AdapterStore(tmp_path, "e" * 64)
    with pytest.raises(InvalidRequest, match=r"adapter 'bad' is damaged: .*adapter.safetensors differs"):
        store.open("bad")
    with pytest.raises(InvalidRequest, match="adapter 'foreign' was made for version ffffffffffff…, but this is eeee"):
        store.open("foreign")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    with pytest.raises(InvalidRequest, match="link is a link; an adapter is a plain folder"):
        store.open("link")
    tensors = store.read(store.open("mine"))
    assert all(np.array_equal(tensors[name], matrix) for name, matrix in adapter_of(1).items())


def test_the_adapter_unused_for_longest_makes_room():
    manager = AdapterManager(2)
    a, b, c = (AdapterRef(name, "1") for name in "abc")
    assert [manager.acquire(ref).slot for ref in (a, b)] == [1, 2]
    assert not manager.can_acquire(c) and manager.can_acquire(a) and manager.can_acquire(None)
    manager.release(b)
    manager.release(a)
    assert not manager.acquire(a).needs_load
    placement = manager.acquire(c)
    assert (placement.slot, placement.needs_load) == (2, True)
    assert manager.active == ("a", "c")
    manager.check_integrity()


def options_of(number: int) -> dict:
    """Greedy, seeded, beams and several sequences in turn."""
    seeded = {"temperature": 1.0, "seed": number}
    kinds = ({}, seeded, {"beam_width": 3, "n": 2}, {"n": 2, **seeded})
    return {"max_tokens": 6 + number % 7, "ignore_eos": True, **kinds[number % 4]}


def test_every_way_to_choose_tokens_gives_the_same_with_an_adapter_alone_and_in_a_crowd(client):
    names = [(None, *NAMES)[number * 7 % 5] for number in range(24)]
    prompts = [prompt_of(number % 3, 20 + number % 3) for number in range(24)]  # the same ones under many adapters
    answers = [
        client.submit(prompt, **options_of(number), adapter=name, priority=-number)
        for number, (prompt, name) in enumerate(zip(prompts, names, strict=True))
    ]
    together = [answer.last() for answer in answers]
    assert [response.error for response in together] == [None] * 24
    for number, response in enumerate(together):
        alone = client.ask(prompts[number], **options_of(number), adapter=names[number])
        assert response.outputs == alone.outputs, (number, names[number])


def test_a_preempted_request_goes_on_with_its_adapter_though_others_took_its_slot(client, model):
    prompts = [prompt_of(number, 9) for number in range(6)]
    slow = [
        client.submit(prompt, n=4, max_tokens=40, ignore_eos=True, adapter=name, priority=1)
        for prompt, name in zip(prompts[:2], "ab", strict=True)
    ]
    urgent = [
        client.submit(prompt, n=4, max_tokens=10, ignore_eos=True, adapter=name)
        for prompt, name in zip(prompts[2:], "cdcd", strict=True)
    ]
    for answer, prompt, name in zip(urgent, prompts[2:], "cdcd", strict=True):
        for output in answer.last().outputs:
            assert list(output.token_ids) == expected(model, prompt, 10, name)
    for answer, prompt, name in zip(slow, prompts[:2], "ab", strict=True):
        for output in answer.last().outputs:
            assert list(output.token_ids) == expected(model, prompt, 40, name)


def test_an_adapter_that_is_used_again_and_again_is_loaded_once(client, monkeypatch):
    loaded: list[int] = []
    load = client.engine._runner.load_adapter

    def counted(slot, tensors):
        loaded.append(slot)
        load(slot, tensors)

    monkeypatch.setattr(client.engine._runner, "load_adapter", counted)
    for name in ("a", "b", "a", "b", None, "a"):
        client.ids([5, 6], max_tokens=2, adapter=name)
    assert loaded == [1, 2]
    client.ids([5, 6], max_tokens=2, adapter="c")  # b was unused for longest
    client.ids([5, 6], max_tokens=2, adapter="a")
    assert loaded == [1, 2, 2]


def test_a_deleted_adapter_serves_on_where_it_lies_and_ends_all_who_wait_for_it(client, directory, model):
    for number, name in enumerate("zy"):
        write_adapter(directory / "adapters" / name, number)
    options = {"max_tokens": 50, "ignore_eos": True}
    running = [iter(client.submit([5, i], stream=True, adapter=name, **options)) for i, name in enumerate("zc")]
    begun = [next(stream) for stream in running]
    late = client.submit([5, 4], adapter="z", **options)
    waiting = [client.submit([5, i], max_tokens=50, n=1 + i, adapter="y") for i in range(3)]
    plain = client.submit([5, 3], **options)
    for name in "zy":
        shutil.rmtree(directory / "adapters" / name)
    assert ["adapter 'y' cannot be read" in answer.last().error for answer in waiting] == [True] * 3
    assert list(plain.last().outputs[0].token_ids) == expected(model, [5, 3], 50, None)
    assert list(late.last().outputs[0].token_ids) == expected(model, [5, 4], 50, "a")
    for i, (first, stream) in enumerate(zip(begun, running, strict=True)):
        tokens = [token for response in (first, *stream) for token in response.outputs[0].token_ids]
        assert tokens == expected(model, [5, i], 50, "ac"[i])
    with pytest.raises(InvalidRequest, match="adapter has value 'z'; this model has a, b, c, d"):
        client.ask([5], adapter="z")


def test_a_client_that_leaves_while_it_waits_for_a_slot_costs_nobody_anything(client, model):
    running = [client.submit([5, i], max_tokens=50, ignore_eos=True, adapter=name) for i, name in enumerate("ab")]
    left = client.submit([5, 6], max_tokens=50, adapter="c")
    left.gone = True
    late = client.submit([5, 7], max_tokens=9, ignore_eos=True, adapter="d")
    for i, answer in enumerate(running):
        assert list(answer.last().outputs[0].token_ids) == expected(model, [5, i], 50, "ab"[i])
    assert list(late.last().outputs[0].token_ids) == expected(model, [5, 7], 9, "d")
    left.last()


def test_tokens_are_those_of_peft_after_a_real_export(checkpoint, tokenizer, tmp_path):
    from exporters import ExportConfig, export
    from exporters.adapters.__main__ import convert

    version = tmp_path / "model" / "1"
    export(ExportConfig(str(checkpoint), version, max_num_seqs=4, lora_slots=1, lora_rank=RANK), certify=False)
    ids, plain = tokenizer("for number in")["input_ids"], AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    wrapped = None
    for name, rank in (("poet", RANK), ("cook", 1)):
        config = peft.LoraConfig(r=rank, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        wrapped = wrapped or peft.get_peft_model(plain, config, adapter_name=name)
        if name not in wrapped.peft_config:
            wrapped.add_adapter(name, config)
    torch.manual_seed(1)
    for path, parameter in wrapped.named_parameters():
        if "lora_" in path:
            torch.nn.init.normal_(parameter, std=0.3)
    wrapped.eval().save_pretrained(tmp_path / "peft")

    def generated(name: str | None) -> list[int]:
        wrapped.set_adapter(name or "poet")
        with torch.inference_mode(), contextlib.nullcontext() if name else wrapped.disable_adapter():
            found = wrapped.generate(input_ids=torch.tensor([ids]), max_new_tokens=20, do_sample=False, pad_token_id=0)
        return found[0, len(ids) :].tolist()

    for name in ("poet", "cook"):
        convert(tmp_path / "peft" / name, version, version.parent / "adapters" / name)
    names = [None, "poet", "cook", "poet", None, "cook"]
    wanted = {name: generated(name) for name in names}
    assert len({tuple(tokens) for tokens in wanted.values()}) == 3
    engine, _ = load_engine(version)
    try:
        answers = [Client(engine, tokenizer).submit(ids, max_tokens=20, adapter=name) for name in names]
        for name, answer in zip(names, answers, strict=True):
            assert list(answer.last().outputs[0].token_ids) == wanted[name]
    finally:
        engine.stop()
