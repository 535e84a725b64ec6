"""model.json and manifest.json are read strictly: a bad value or a changed file is named."""

from __future__ import annotations

import dataclasses
import json

import pytest

from triton_backend import version_folder
from triton_backend.config import EngineConfig, LayerConfig, LoraConfig, LoraTarget, ModelConfig, VersionConfig
from triton_backend.errors import VersionFolderError

pytestmark = pytest.mark.unit

CONFIG = VersionConfig(
    ModelConfig(
        "LlamaForCausalLM", "llama", 100, 64, (LayerConfig(2, 16),), 10, (1,), generation_defaults={"top_k": 5}
    ),
    EngineConfig(max_model_len=64),
)

SEQ2SEQ = VersionConfig(
    dataclasses.replace(
        CONFIG.model,
        kind="encoder_decoder",
        encoder_graph="encoder.onnx",
        cross_layers=(LayerConfig(2, 16),),
        decoder_start_token_id=0,
        forced_bos_token_id=7,
        forced_eos_token_id=1,
        source_vocab_size=90,
        lora=LoraConfig(2, 4, (LoraTarget("layers.0.q_proj", 32, 32, (1, 0)),)),
    ),
    EngineConfig(max_model_len=64, max_source_len=32),
)


def test_model_json_round_trips(tmp_path):
    CONFIG.write(tmp_path)
    assert VersionConfig.read(tmp_path) == CONFIG


def test_model_json_of_an_encoder_decoder_with_adapters_round_trips(tmp_path):
    SEQ2SEQ.write(tmp_path)
    assert VersionConfig.read(tmp_path) == SEQ2SEQ


def test_steps_of_an_encoder_decoder_are_not_captured():
    with pytest.raises(VersionFolderError, match="cuda_graphs is true; steps of an encoder_decoder cannot be captured"):
        dataclasses.replace(SEQ2SEQ, engine=dataclasses.replace(SEQ2SEQ.engine, device="cuda", cuda_graphs=True))


def test_an_encoder_decoder_without_room_for_a_source_is_refused(tmp_path):
    SEQ2SEQ.write(tmp_path)
    document = json.loads((tmp_path / "model.json").read_text())
    document["engine"]["max_source_len"] = 0
    (tmp_path / "model.json").write_text(json.dumps(document))
    with pytest.raises(VersionFolderError, match=r"model\.json: max_source_len has value 0; an encoder_decoder needs"):
        VersionConfig.read(tmp_path)


@pytest.mark.parametrize(
    ("part", "key", "value", "said"),
    [
        ("engine", "max_model_length", 7, "unknown EngineConfig key 'max_model_length'; known keys are"),
        ("engine", "max_num_seqs", 0, "max_num_seqs has value 0; expected a whole number ≥ 1"),
        ("engine", "max_num_seqs", "many", "max_num_seqs has value 'many'"),
        ("engine", "max_num_batched_tokens", 32, "expected at least max_num_seqs + 1 = 33"),
        ("engine", "num_threads", -1, "num_threads has value -1"),
        ("engine", "num_threads", "all", "num_threads has value 'all'; expected a whole number ≥ 0"),
        ("engine", "cuda_graphs", True, "cuda_graphs is true, but device has value 'cpu'; expected 'cuda'"),
        ("model", "layers", [], "layers is empty"),
        ("model", "kind", "decoder-only", "kind has value 'decoder-only'; expected one of decoder, encoder_decoder"),
        ("model", "kind", "encoder_decoder", "encoder_graph has value None; an encoder_decoder model needs it"),
        ("model", "generation_defaults", {"num_beams": 4}, "generation_defaults has 'num_beams'; expected names of"),
        ("model", "vocabulary", 1, "unknown ModelConfig key 'vocabulary'"),
    ],
)
def test_a_bad_value_is_a_load_failure_that_names_it(tmp_path, part, key, value, said):
    CONFIG.write(tmp_path)
    document = json.loads((tmp_path / "model.json").read_text())
    document[part][key] = value
    (tmp_path / "model.json").write_text(json.dumps(document))
    with pytest.raises(VersionFolderError) as caught:
        VersionConfig.read(tmp_path)
    assert said in str(caught.value) and "model.json" in str(caught.value)


def test_a_default_that_no_request_may_have_is_left_out(tmp_path):
    CONFIG.write(tmp_path)
    document = json.loads((tmp_path / "model.json").read_text())
    document["model"]["generation_defaults"] = {"top_p": 1.5, "top_k": 7, "temperature": "hot"}
    (tmp_path / "model.json").write_text(json.dumps(document))
    assert VersionConfig.read(tmp_path).model.generation_defaults == {"top_k": 7}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', '{"format": 2}', '{"format": 2, "model": 3}'])
def test_a_file_that_is_no_model_json_is_refused(tmp_path, text):
    (tmp_path / "model.json").write_text(text)
    with pytest.raises(VersionFolderError, match=r"model\.json"):
        VersionConfig.read(tmp_path)


@pytest.fixture
def sealed(tmp_path):
    CONFIG.write(tmp_path)
    (tmp_path / "model.onnx.data").write_bytes(bytes(range(256)))
    version_folder.seal(tmp_path, {"checkpoint": "x"}, {"torch": "2"})
    return tmp_path


def test_a_sealed_folder_verifies_and_has_an_identity(sealed):
    assert set(version_folder.verify(sealed)["files"]) == {"model.json", "model.onnx.data"}
    assert len(version_folder.digest(sealed)) == 64


def test_a_changed_byte_is_found_and_the_file_named(sealed):
    path = sealed / "model.onnx.data"
    data = bytearray(path.read_bytes())
    data[7] ^= 1
    path.write_bytes(data)
    with pytest.raises(VersionFolderError, match=r"model\.onnx\.data differs from manifest\.json"):
        version_folder.verify(sealed)


def test_a_missing_an_extra_and_a_linked_file_are_found(sealed):
    (sealed / "extra").write_text("x")
    with pytest.raises(VersionFolderError, match="extra is not listed"):
        version_folder.verify(sealed)
    (sealed / "extra").unlink()
    (sealed / "extra").symlink_to("/etc/passwd")
    with pytest.raises(VersionFolderError, match="not a plain file"):
        version_folder.verify(sealed)
    (sealed / "extra").unlink()
    (sealed / "model.onnx.data").unlink()
    with pytest.raises(VersionFolderError, match=r"model\.onnx\.data is missing"):
        version_folder.verify(sealed)


def test_a_folder_without_a_manifest_is_an_unfinished_export(tmp_path):
    CONFIG.write(tmp_path)
    with pytest.raises(VersionFolderError, match="the export did not finish"):
        version_folder.verify(tmp_path)
