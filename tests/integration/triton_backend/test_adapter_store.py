"""Which adapters exist, and that what is read is what was converted: damaged, foreign and hostile ones are refused."""

from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from safetensors.numpy import save_file

from triton_backend import version_folder
from triton_backend.adapter_store import AdapterStore
from triton_backend.errors import InvalidRequest

from .test_adapters_per_request import write_adapter
from .test_version_kinds import adapter_of

pytestmark = pytest.mark.integration

BASE, OTHER = "e" * 64, "f" * 64


@pytest.fixture
def folder(tmp_path):
    """Adapters a and b of this version, in ``adapters``."""
    for seed, name in enumerate("ab"):
        write_adapter(tmp_path / "adapters" / name, seed, BASE)
    return tmp_path / "adapters"


@pytest.fixture
def store(folder):
    return AdapterStore(folder, BASE)


def refused(store: AdapterStore, name: str) -> str:
    with pytest.raises(InvalidRequest) as caught:
        store.open(name)
    return str(caught.value)


def reseal(folder) -> None:
    (folder / "manifest.json").unlink()
    version_folder.seal(folder, {}, {})


def test_what_was_converted_is_what_is_read(store):
    for seed, name in enumerate("ab"):
        tensors = store.read(store.open(name))
        assert tensors.keys() == adapter_of(seed).keys()
        assert all(np.array_equal(tensors[key], matrix) for key, matrix in adapter_of(seed).items())


def test_only_finished_folders_are_listed(store, folder):
    (folder / "unfinished").mkdir()
    (folder / ".partial").mkdir()
    (folder / ".partial" / "manifest.json").write_text("{}")
    (folder / "a file").touch()
    assert store.names() == ["a", "b"]
    assert "adapter has value 'unfinished'; this model has a, b" in refused(store, "unfinished")


def test_a_model_without_adapters_says_so(tmp_path):
    assert "adapter has value 'a'; this model has no adapters" in refused(AdapterStore(tmp_path / "none", BASE), "a")


def test_the_list_of_a_refusal_is_short_however_many_there_are(store, folder):
    for number in range(30):
        write_adapter(folder / f"n{number:02}", number, BASE)
    assert refused(store, "x").endswith("this model has a, b, " + ", ".join(f"n{i:02}" for i in range(18)) + ", …")


@pytest.mark.parametrize(
    "name",
    [
        *("..", ".", "", "/", "../adapters/a", "a/", "./a", "a/../b", "a/b", "\\a", "a\\..\\b", "/etc", "~", "%61"),
        *("a\0", "\0", "a\n", " a", "a ", "-a", "_a", ".a", "A", "*", "?", "[a]", "a" * 129, "a" * 300, "x" * 100_000),
        *("\N{CYRILLIC SMALL LETTER A}", "\N{FULLWIDTH LATIN SMALL LETTER A}", "a\N{COMBINING DIAERESIS}"),
        *("a\N{ZERO WIDTH SPACE}", "\N{RIGHT-TO-LEFT OVERRIDE}a", "\ud800", "１"),
    ],
)
def test_names_that_are_no_folder_of_an_adapter_are_refused_and_shown_short(store, name):
    said = refused(store, name)
    assert said.endswith("; this model has a, b") and len(said) < 300
    assert said.isprintable()


def test_links_and_pipes_are_never_followed(store, folder):
    (folder / "link").symlink_to(folder / "a")
    assert "link is a link; an adapter is a plain folder" in refused(store, "link")
    (folder / "b" / "adapter.safetensors").unlink()
    (folder / "b" / "adapter.safetensors").symlink_to(folder / "a" / "adapter.safetensors")
    assert "adapter 'b' is damaged" in refused(store, "b") and "is not a plain file" in refused(store, "b")
    (folder / "b" / "adapter.safetensors").unlink()
    os.mkfifo(folder / "b" / "adapter.safetensors")
    assert "is not a plain file" in refused(store, "b")


@pytest.mark.parametrize(
    ("manifest", "said"),
    [
        ("", "cannot read"),
        ("[" * 100_000, ""),
        ("[]", "is not a manifest of format 1"),
        ('{"format": 1, "files": {"x": 5}}', "x is missing"),
        ('{"format": 1, "files": {"adapter.json": 5}}', "TypeError"),
        ('{"format": 1, "files": {"adapter.json": {}}}', "KeyError"),
        ('{"format": 1, "files": {"../b/adapter.json": {}}}', "is missing"),
        ('{"format": 2, "files": {}}', "is not a manifest of format 1"),
    ],
)
def test_a_damaged_manifest_is_refused(store, folder, manifest, said):
    (folder / "a" / "manifest.json").write_text(manifest)
    found = refused(store, "a")
    assert "adapter 'a' is damaged: " in found and said in found and found.endswith("; convert it again")


@pytest.mark.parametrize(
    "facts", ["", "{", "[]", "null", "{}", '{"base": null}', '{"base": "x"}', '{"base": {}}', "[" * 100_000, "\ud800"]
)
def test_facts_that_name_no_base_are_refused(store, folder, facts):
    (folder / "a" / "adapter.json").write_bytes(facts.encode("utf-8", "surrogatepass"))
    reseal(folder / "a")
    assert "adapter 'a' is damaged" in refused(store, "a")


@pytest.mark.parametrize("base", [OTHER, "", BASE[:-1], BASE.upper(), None, 5])
def test_an_adapter_of_another_version_is_refused(store, folder, base):
    facts = json.loads((folder / "a" / "adapter.json").read_text())
    (folder / "a" / "adapter.json").write_text(json.dumps({**facts, "base": {"digest": base}}))
    reseal(folder / "a")
    assert "adapter 'a' was made for version" in refused(store, "a")
    assert "this is eeeeeeeeeeee…; convert it for this version" in refused(store, "a")


def test_a_version_without_a_seal_takes_any_adapter(folder):
    assert AdapterStore(folder, "").open("a").name == "a"


def test_an_extra_or_missing_file_is_refused(store, folder):
    (folder / "a" / "more").touch()
    assert "more is not listed in manifest.json" in refused(store, "a")
    (folder / "b" / "adapter.safetensors").unlink()
    assert "adapter.safetensors is missing" in refused(store, "b")


@pytest.mark.parametrize("weights", [b"", b"x", b"\xff" * 8, b"\x02" + b"\0" * 7 + b"{}", b"\0" * 1000])
def test_sealed_weights_that_are_no_tensors_are_refused_or_change_nothing(store, folder, weights):
    (folder / "a" / "adapter.safetensors").write_bytes(weights)
    reseal(folder / "a")
    ref = store.open("a")
    try:
        assert store.read(ref) == {}
    except InvalidRequest as error:
        assert "adapter 'a' cannot be read" in str(error) and str(error).endswith("; convert it again")


@pytest.mark.parametrize("dtype", ["F8_E5M2", "F4", "F6_E2M3", "X1"])
def test_types_of_numbers_that_numpy_lacks_are_refused(store, folder, dtype):
    header = json.dumps({"x": {"dtype": dtype, "shape": [8], "data_offsets": [0, 8]}})
    content = len(header).to_bytes(8, "little") + header.encode() + bytes(8)
    (folder / "a" / "adapter.safetensors").write_bytes(content)
    reseal(folder / "a")
    with pytest.raises(InvalidRequest, match="adapter 'a' cannot be read"):
        store.read(store.open("a"))


def test_what_changed_after_it_was_opened_is_not_read(store, folder):
    opened = store.open("a")
    save_file(adapter_of(7), folder / "a" / "adapter.safetensors")
    with pytest.raises(InvalidRequest, match=r"adapter 'a' is damaged: .*adapter\.safetensors differs"):
        store.read(opened)
    reseal(folder / "a")
    with pytest.raises(InvalidRequest, match="adapter 'a' was replaced while the request waited; send it again"):
        store.read(opened)
    assert store.open("a") != opened
    assert np.array_equal(store.read(store.open("a"))["lora.layers.0.query.a"], adapter_of(7)["lora.layers.0.query.a"])


def test_an_adapter_that_comes_back_is_the_same_one(store, folder, tmp_path):
    opened = store.open("a")
    (folder / "a").rename(tmp_path / "away")
    assert refused(store, "a").endswith("this model has b")
    with pytest.raises(InvalidRequest, match="adapter 'a' cannot be read"):
        store.read(opened)
    (tmp_path / "away").rename(folder / "a")
    assert store.open("a") == opened
    assert store.read(opened).keys() == adapter_of(0).keys()


def test_adapters_swapped_between_names_are_told_apart(store, folder, tmp_path):
    a, b = store.open("a"), store.open("b")
    (folder / "a").rename(tmp_path / "c")
    (folder / "b").rename(folder / "a")
    (tmp_path / "c").rename(folder / "b")
    assert store.open("a").digest == b.digest and store.open("b").digest == a.digest
    with pytest.raises(InvalidRequest, match="was replaced"):
        store.read(a)


def test_many_threads_open_while_an_adapter_comes_and_goes(store, folder, tmp_path):
    a = store.open("a")

    def opened(_: int) -> str:
        try:
            return store.open("a").digest
        except InvalidRequest as error:
            return "gone" if "this model has" in str(error) or "is damaged" in str(error) else str(error)

    with ThreadPoolExecutor(8) as pool:
        found = [pool.submit(opened, i) for i in range(200)]
        for _ in range(20):
            (folder / "a").rename(tmp_path / "away")
            shutil.copytree(tmp_path / "away", tmp_path / "new")
            (tmp_path / "new").rename(folder / "a")
            shutil.rmtree(tmp_path / "away")
    assert {future.result() for future in found} <= {a.digest, "gone"}
    assert store.open("a") == a
