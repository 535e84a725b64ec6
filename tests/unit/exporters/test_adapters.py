"""PEFT folders: what is refused, with which words, and what becomes of what is not. The folders are made by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from exporters.adapters import open_adapter, slot_tensors
from exporters.adapters.__main__ import convert
from exporters.errors import ExportError, InvalidAdapter, InvalidVersion, UnsafeCheckpoint, UnsupportedAdapter
from triton_backend.config import EngineConfig, LayerConfig, LoraConfig, LoraTarget, ModelConfig, VersionConfig
from triton_backend.version_folder import digest, read_manifest, seal, verify

pytestmark = pytest.mark.unit

IN, OUT, RANK = 6, 4, 2
Q, V = "model.layers.{}.self_attn.q_proj", "model.layers.{}.self_attn.v_proj"
SLOTS = LoraConfig(2, 3, tuple(LoraTarget(name.format(layer), IN, OUT) for layer in range(2) for name in (Q, V)))
CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "base_model_name_or_path": "someone/base",
    "r": RANK,
    "lora_alpha": 8,
    "bias": "none",
    "target_modules": ["q_proj", "v_proj"],
    "init_lora_weights": True,
    "lora_dropout": 0.1,
    "use_dora": False,
    "modules_to_save": None,
}

Change = Callable[[dict[str, np.ndarray]], Any]


def tensors_of(modules: list[str], rank: int = RANK, in_features: int = IN) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    found = {}
    for module in modules:
        found[f"base_model.model.{module}.lora_A.weight"] = generator.random((rank, in_features), np.float32)
        found[f"base_model.model.{module}.lora_B.weight"] = generator.random((OUT, rank), np.float32)
    return found


def write(folder: Path, change: Change = lambda tensors: None, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    tensors = tensors_of([target.name for target in SLOTS.targets])
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def refused(folder: Path, kind: type[ExportError], *words: str, slots: LoraConfig = SLOTS) -> None:
    with pytest.raises(kind) as caught:
        slot_tensors(open_adapter(folder), slots)
    for word in words:
        assert word in str(caught.value)


def a_name(module: str) -> str:
    return f"base_model.model.{module}.lora_A.weight"


def b_name(module: str) -> str:
    return f"base_model.model.{module}.lora_B.weight"


def test_rank_is_filled_up_and_the_scale_is_in_b(tmp_path: Path) -> None:
    adapter = open_adapter(write(tmp_path / "adapter"))
    found = slot_tensors(adapter, SLOTS)
    assert list(found) == sorted(target.name for target in SLOTS.targets)
    name = Q.format(0)
    a, b = found[name]
    matrices = tensors_of([target.name for target in SLOTS.targets])
    assert (a.shape, b.shape, a.dtype, b.dtype) == ((IN, 3), (3, OUT), np.float32, np.float32)
    np.testing.assert_array_equal(a, np.pad(matrices[a_name(name)].T, ((0, 0), (0, 1))))
    np.testing.assert_array_equal(b, np.pad(matrices[b_name(name)].T * 4, ((0, 1), (0, 0))))


def test_scale_divides_by_the_root_of_the_rank_if_it_is_stabilized(tmp_path: Path) -> None:
    adapter = open_adapter(write(tmp_path / "adapter", use_rslora=True))
    assert {matrices.scale for matrices in adapter.modules.values()} == {8 / 2**0.5}


def test_patterns_of_rank_and_alpha_overrule_the_defaults(tmp_path: Path) -> None:
    name = V.format(1)

    def one_of_rank_1(tensors: dict[str, np.ndarray]) -> None:
        tensors |= tensors_of([name], rank=1)

    config = {"rank_pattern": {"layers.1.self_attn.v_proj": 1}, "alpha_pattern": {r"layers\.\d+\.self_attn\.v_proj": 3}}
    modules = open_adapter(write(tmp_path / "adapter", one_of_rank_1, **config)).modules
    assert {module: (matrices.rank, matrices.scale) for module, matrices in modules.items()} == {
        Q.format(0): (2, 4.0),
        Q.format(1): (2, 4.0),
        V.format(0): (2, 1.5),
        V.format(1): (1, 3.0),
    }


def test_columns_follow_the_graph(tmp_path: Path) -> None:
    slots = LoraConfig(1, RANK, tuple(LoraTarget(t.name, IN, OUT, (2, 0, 3, 1)) for t in SLOTS.targets))
    adapter = open_adapter(write(tmp_path / "adapter"))
    for name, (_, b) in slot_tensors(adapter, slots).items():
        np.testing.assert_array_equal(b, slot_tensors(adapter, SLOTS)[name][1][:RANK, [2, 0, 3, 1]])


@pytest.mark.parametrize(
    ("config", "is_changed"),
    [
        ({"target_modules": ["self_attn.q_proj"]}, [True, False, True, False]),
        ({"target_modules": r".*layers\.0\..*_proj"}, [True, True, False, False]),
        ({"target_modules": ["q_proj", V.format(1)], "layers_to_transform": [0]}, [True, False, False, True]),
        ({"layers_to_transform": 1, "layers_pattern": "layers"}, [False, False, True, True]),
        ({"exclude_modules": ["layers.0.self_attn.q_proj"]}, [False, True, True, True]),
    ],
)
def test_targets_may_be_a_list_or_a_regex_and_only_some_layers(
    config: dict[str, Any], is_changed: list[bool], tmp_path: Path
) -> None:
    adapter = open_adapter(write(tmp_path / "adapter", **config))
    assert [adapter.changes(target.name) for target in SLOTS.targets] == is_changed


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("use_dora", True),
        ("modules_to_save", ["lm_head"]),
        ("trainable_token_indices", [1, 2]),
        ("bias", "lora_only"),
        ("lora_bias", True),
        ("peft_type", "IA3"),
        ("layer_replication", [[0, 2]]),
        ("init_lora_weights", "pissa"),
        ("invented_tomorrow", 7),
    ],
)
def test_other_kinds_of_adapters_are_refused_by_name(setting: str, value: Any, tmp_path: Path) -> None:
    refused(write(tmp_path / "adapter", **{setting: value}), UnsupportedAdapter, setting, repr(value))


@pytest.mark.parametrize("setting", [{"r": 0}, {"lora_alpha": "many"}, {"rank_pattern": {"q_proj": -1}}])
def test_numbers_that_cannot_be_are_refused(setting: dict[str, Any], tmp_path: Path) -> None:
    refused(write(tmp_path / "adapter", **setting), InvalidAdapter, next(iter(setting)), "greater than 0")


def test_a_pattern_that_is_no_regex_is_refused(tmp_path: Path) -> None:
    refused(write(tmp_path / "adapter", target_modules="(q_proj"), InvalidAdapter, "'(q_proj'", "no regex")


def test_a_pickle_is_refused_by_name_and_not_read(tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    refused(folder, UnsafeCheckpoint, "adapter_model.bin", "pickle")


def test_a_link_to_outside_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter")
    (folder / "adapter_model.safetensors").rename(tmp_path / "elsewhere")
    (folder / "adapter_model.safetensors").symlink_to(tmp_path / "elsewhere")
    refused(folder, UnsafeCheckpoint, "link to", "elsewhere")


def test_missing_files_are_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter")
    (folder / "adapter_model.safetensors").unlink()
    refused(folder, InvalidAdapter, "no adapter_model.safetensors")
    (folder / "adapter_config.json").unlink()
    refused(folder, InvalidAdapter, "no adapter_config.json")


def test_truncated_weights_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "adapter") / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    refused(path.parent, InvalidAdapter, "cut short")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_named(value: float, tmp_path: Path) -> None:
    name = a_name(Q.format(1))
    folder = write(tmp_path / "adapter", lambda tensors: tensors[name].__setitem__((0, 1), value))
    refused(folder, InvalidAdapter, name, "NaN or infinite")


def test_a_scale_that_overflows_is_refused(tmp_path: Path) -> None:
    name = b_name(Q.format(1))
    folder = write(tmp_path / "adapter", lambda tensors: tensors[name].__setitem__((0, 1), 3e38))
    refused(folder, InvalidAdapter, Q.format(1), "infinite when its scale 4")


def test_half_a_pair_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter", lambda tensors: tensors.pop(b_name(Q.format(1))))
    refused(folder, InvalidAdapter, "lacks lora_B", Q.format(1))


def test_a_rank_other_than_the_config_says_is_refused(tmp_path: Path) -> None:
    refused(write(tmp_path / "adapter", r=3), InvalidAdapter, "rank 2 (lora_A) and 2 (lora_B)", "says 3")


def test_tensors_that_are_no_lora_matrices_are_named(tmp_path: Path) -> None:
    name = "base_model.model.lm_head.weight"
    folder = write(tmp_path / "adapter", lambda tensors: tensors.update({name: np.zeros((3, 3), np.float32)}))
    refused(folder, UnsupportedAdapter, name)


def test_a_rank_larger_than_the_graph_s_is_refused(tmp_path: Path) -> None:
    slots = LoraConfig(2, 1, SLOTS.targets)
    refused(write(tmp_path / "adapter"), UnsupportedAdapter, "rank 2", "rank 1", "--lora-rank 2", slots=slots)


def test_a_module_without_a_slot_is_named(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj"
    folder = write(tmp_path / "adapter", lambda tensors: tensors.update(tensors_of([name])))
    refused(folder, UnsupportedAdapter, name, "--lora-targets q_proj,up_proj,v_proj")


def test_an_adapter_of_a_deeper_base_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter", lambda tensors: tensors.update(tensors_of([Q.format(5)])))
    refused(folder, InvalidAdapter, "changes layer 5", "has 2 layers", "another base (someone/base)")


def test_an_adapter_of_a_shallower_base_is_refused(tmp_path: Path) -> None:
    def shallow(tensors: dict[str, np.ndarray]) -> None:
        for name in [name for name in tensors if ".layers.1." in name]:
            tensors.pop(name)

    refused(write(tmp_path / "adapter", shallow), InvalidAdapter, "lacks the matrices of", ".layers.1.", "another base")


def test_an_adapter_of_a_wider_base_is_refused(tmp_path: Path) -> None:
    name = Q.format(0)
    folder = write(tmp_path / "adapter", lambda tensors: tensors.update(tensors_of([name], in_features=8)))
    refused(folder, InvalidAdapter, f"changes {name} from 8 to 4 features", "has 6 and 4", "another base")


@pytest.fixture
def version(tmp_path: Path) -> Path:
    """A version folder without its graph, which nobody here reads."""
    folder = tmp_path / "version"
    folder.mkdir()
    model = ModelConfig("LlamaForCausalLM", "llama", 320, 256, (LayerConfig(2, 16),), 64, lora=SLOTS)
    VersionConfig(model, EngineConfig(64)).write(folder)
    seal(folder, {"checkpoint": "someone/base"}, {})
    return folder


def test_adapter_folder_is_sealed_and_named_after_the_graph_s_inputs(version: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    adapter = write(tmp_path / "adapter")
    document = convert(adapter, version, out, name="poet")
    assert sorted(path.name for path in out.iterdir()) == ["adapter.json", "adapter.safetensors", "manifest.json"]
    assert json.loads((out / "adapter.json").read_text()) == document
    assert (document["name"], document["rank"], document["base"]["digest"]) == ("poet", 2, digest(version))
    verify(out)
    assert set(read_manifest(out)["source"]["files"]) == {"adapter_config.json", "adapter_model.safetensors"}
    expected = {
        f"lora.{name}.{side}": matrix
        for name, pair in slot_tensors(open_adapter(adapter), SLOTS).items()
        for side, matrix in zip("ab", pair, strict=True)
    }
    found = load_file(out / "adapter.safetensors")
    assert set(found) == set(expected)
    for name, matrix in expected.items():
        np.testing.assert_array_equal(found[name], matrix)


def test_an_adapter_of_another_model_of_the_hub_is_refused_unless_asked(version: Path, tmp_path: Path) -> None:
    adapter = write(tmp_path / "adapter", base_model_name_or_path="someone/other")
    with pytest.raises(InvalidAdapter, match="trained on someone/other; this version was made from someone/base"):
        convert(adapter, version, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    convert(adapter, version, tmp_path / "out", is_other_base_ok=True)


def test_a_version_without_slots_or_seal_is_refused(version: Path, tmp_path: Path) -> None:
    adapter = write(tmp_path / "adapter")
    with pytest.raises(InvalidVersion, match=r"has no manifest\.json"):
        convert(adapter, tmp_path, tmp_path / "out")
    model = ModelConfig("LlamaForCausalLM", "llama", 320, 256, (LayerConfig(2, 16),), 64)
    VersionConfig(model, EngineConfig(64)).write(version)
    with pytest.raises(UnsupportedAdapter, match=r"no slots for adapters; .* --lora-slots"):
        convert(adapter, version, tmp_path / "out")
    assert not (tmp_path / "out").exists()
