"""Adapters by name: every request follows its own, whatever its batch-mates use and however few slots there are."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file
from transformers import AutoTokenizer

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
def tokenizer(checkpoint):
    return AutoTokenizer.from_pretrained(checkpoint)


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


@pytest.mark.parametrize("name", ["e", "../a", "a/../b", "a\0", "a" * 128, "Å", ".", "%2e"])
def test_an_unknown_adapter_is_refused_with_those_that_exist(client, name):
    with pytest.raises(InvalidRequest, match="this model has a, b, c, d"):
        client.ask([5], adapter=name)


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
