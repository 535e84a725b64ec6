"""Every reason to refuse a checkpoint before anything of it is trusted; needs no PyTorch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from exporters.checkpoint import open_checkpoint
from exporters.errors import ExportError, InvalidCheckpoint, UnsafeCheckpoint, UnsupportedArchitecture

pytestmark = pytest.mark.unit


def write_json(path: Path, document: Any) -> None:
    path.write_text(json.dumps(document), encoding="utf-8")


def write_tensors(path: Path, *names: str) -> None:
    """A safetensors file of float32 tensors with one element each."""
    entries = {
        name: {"dtype": "F32", "shape": [1], "data_offsets": [4 * index, 4 * index + 4]}
        for index, name in enumerate(names)
    }
    header = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4 * len(names))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound checkpoint; each test breaks one thing."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    write_json(folder / "config.json", {"model_type": "llama"})
    write_json(folder / "tokenizer.json", {"version": "1.0"})
    write_json(folder / "tokenizer_config.json", {})
    write_json(folder / "generation_config.json", {"eos_token_id": [1, 2]})
    write_tensors(folder / "model.safetensors", "a", "b")
    return folder


@pytest.fixture
def sharded(folder: Path) -> Path:
    (folder / "model.safetensors").unlink()
    write_tensors(folder / "model-1.safetensors", "a")
    write_tensors(folder / "model-2.safetensors", "b")
    weight_map = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    return folder


def refused(folder: Path, kind: type[ExportError], *words: str) -> None:
    with pytest.raises(kind) as caught:
        open_checkpoint(str(folder))
    for word in words:
        assert word in str(caught.value)


def test_a_sound_folder_is_opened(folder: Path) -> None:
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.model_type == "llama"
    assert checkpoint.generation_config["eos_token_id"] == [1, 2]
    assert [path.name for path in checkpoint.files] == ["model.safetensors"]


def test_a_sound_sharded_folder_is_opened(sharded: Path) -> None:
    files = open_checkpoint(str(sharded)).files
    assert [path.name for path in files] == ["model-1.safetensors", "model-2.safetensors"]


def test_generation_and_tokenizer_config_may_be_missing(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    assert open_checkpoint(str(folder)).generation_config == {}


def test_a_path_that_does_not_exist_is_not_looked_up_on_the_hub(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", InvalidCheckpoint, "nothing", "is not a folder")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt", "weights.pkl"])
def test_pickled_weights_are_refused_with_how_to_convert_them(folder: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b"\x80\x04.")
    refused(folder, UnsafeCheckpoint, name, "pickle", "save_pretrained", "model.safetensors")


def test_pickled_weights_beside_safe_ones_are_never_read(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert [path.name for path in open_checkpoint(str(folder)).files] == ["model.safetensors"]


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_custom_code_is_refused(folder: Path, name: str) -> None:
    document = {"model_type": "llama", "auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}}
    write_json(folder / name, document)
    refused(folder, UnsafeCheckpoint, name, "auto_map", "modeling_evil.Evil", "never")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    refused(folder, InvalidCheckpoint, str(folder), name)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_a_damaged_json_file_is_named(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text, encoding="utf-8")
    refused(folder, InvalidCheckpoint, name)


def test_a_config_without_model_type_is_refused(folder: Path) -> None:
    write_json(folder / "config.json", {"hidden_size": 8})
    refused(folder, InvalidCheckpoint, "config.json", "model_type None", "llama")


def test_an_adapter_is_refused_with_how_to_merge_it(folder: Path) -> None:
    (folder / "config.json").unlink()
    write_json(folder / "adapter_config.json", {"peft_type": "LORA"})
    refused(folder, InvalidCheckpoint, "adapter", "merge_and_unload")


def test_an_adapter_inside_a_model_is_refused(folder: Path) -> None:
    write_json(folder / "adapter_config.json", {"peft_type": "LORA"})
    refused(folder, InvalidCheckpoint, "beside its model", "merge_and_unload")


def test_quantized_weights_are_refused(folder: Path) -> None:
    write_json(folder / "config.json", {"model_type": "llama", "quantization_config": {"quant_method": "gptq"}})
    refused(folder, UnsupportedArchitecture, "gptq", "float weights")


@pytest.mark.parametrize("num_bytes", [0, 5, 60, -1])
def test_a_file_of_weights_that_was_cut_short_is_refused(folder: Path, num_bytes: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:num_bytes])
    refused(folder, InvalidCheckpoint, "model.safetensors", "cut short")


def test_a_git_lfs_pointer_is_recognised(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    refused(folder, InvalidCheckpoint, "model.safetensors", "Git LFS pointer")


def test_a_damaged_header_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((4).to_bytes(8, "little") + b"]]]]")
    refused(folder, InvalidCheckpoint, "model.safetensors", "damaged header")


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "model-2.safetensors").unlink()
    refused(sharded, InvalidCheckpoint, "model-2.safetensors", "missing")


def test_a_shard_without_its_tensor_is_named(sharded: Path) -> None:
    write_tensors(sharded / "model-2.safetensors", "c")
    refused(sharded, InvalidCheckpoint, "model-2.safetensors", "lacks b")


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "model.bin"])
def test_a_shard_outside_the_folder_or_of_another_kind_is_refused(sharded: Path, name: str) -> None:
    write_json(sharded / "model.safetensors.index.json", {"weight_map": {"a": name}})
    refused(sharded, UnsafeCheckpoint, name)


def test_an_index_without_a_weight_map_is_refused(sharded: Path) -> None:
    write_json(sharded / "model.safetensors.index.json", {})
    refused(sharded, InvalidCheckpoint, "weight_map")


def test_a_link_out_of_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.safetensors"
    os.replace(folder / "model.safetensors", outside)
    (folder / "model.safetensors").symlink_to(outside)
    refused(folder, UnsafeCheckpoint, "model.safetensors", str(outside), "copy")


def test_a_link_inside_the_folder_is_fine(folder: Path) -> None:
    os.replace(folder / "model.safetensors", folder / "weights.safetensors")
    (folder / "model.safetensors").symlink_to("weights.safetensors")
    assert open_checkpoint(str(folder)).files


def test_the_hub_cache_may_link_to_its_own_blobs(folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123abcd"
    blobs = tmp_path / "models--org--name" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in folder.iterdir():
        os.replace(path, blobs / path.name)
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    assert open_checkpoint(str(snapshot)).model_type == "llama"


def test_a_hard_link_is_fine(folder: Path, tmp_path: Path) -> None:
    os.link(folder / "model.safetensors", tmp_path / "second-name")
    assert open_checkpoint(str(folder)).files


def test_headers_tell_the_shapes(sharded: Path) -> None:
    shapes = open_checkpoint(str(sharded)).tensor_shapes()
    assert shapes == {"a": ((1,), sharded / "model-1.safetensors"), "b": ((1,), sharded / "model-2.safetensors")}
