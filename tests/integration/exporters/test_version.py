"""The version folder: complete, sealed, readable by the engine, and never left half written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

import exporters.decoder_version
from exporters import ExportConfig, export
from exporters.errors import ExportCancelled, ExportError, InvalidCheckpoint, InvalidConfig, OutputExists
from exporters.version import staged
from tests.integration.exporters.conftest import CHAT_TEMPLATE, VOCAB_SIZE
from triton_backend.config import LayerConfig, VersionConfig
from triton_backend.version_folder import MANIFEST_JSON, read_manifest, seal, verify

pytestmark = pytest.mark.integration


def test_folder_holds_everything_the_engine_needs_and_nothing_else(llama_version: Path) -> None:
    assert sorted(path.name for path in llama_version.iterdir()) == [
        "chat_template.jinja",
        "generation_config.json",
        "manifest.json",
        "model.json",
        "model.onnx",
        "model.onnx.data",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert [path.name for path in llama_version.parent.iterdir()] == ["1"]


def test_folder_is_sealed_with_its_source_and_environment(llama_version: Path, llama_checkpoint: Path) -> None:
    verify(llama_version)
    manifest = read_manifest(llama_version)
    assert manifest["source"]["checkpoint"] == str(llama_checkpoint)
    assert set(manifest["source"]["files"]) == {"config.json", "model.safetensors"}
    assert {"torch", "transformers", "onnx", "python"} <= set(manifest["environment"])


def test_model_json_tells_the_engine_the_facts(llama_version: Path) -> None:
    config = VersionConfig.read(llama_version)
    assert config.model.architecture == "LlamaForCausalLM"
    assert config.model.vocab_size == VOCAB_SIZE
    assert config.model.layers == (LayerConfig(2, 16), LayerConfig(2, 16))
    assert config.model.num_top_logits == 64
    assert (config.model.bos_token_id, config.model.eos_token_ids, config.model.pad_token_id) == (0, (1,), 2)
    assert config.model.generation_defaults == {"temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1}
    assert (config.engine.max_model_len, config.engine.max_num_seqs) == (48, 4)


def test_tokenizer_json_alone_gives_the_ids_that_transformers_gives(
    llama_version: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    text = "Hello world, 5 jugs – größer!"
    assert Tokenizer.from_file(str(llama_version / "tokenizer.json")).encode(text).ids == tokenizer(text)["input_ids"]
    assert (llama_version / "chat_template.jinja").read_text() == CHAT_TEMPLATE


def test_several_end_tokens_are_kept(make_checkpoint: Callable[..., Path], traced: None, tmp_path: Path) -> None:
    checkpoint = make_checkpoint("llama")
    path = checkpoint / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": [1, 7]}))
    export(ExportConfig(str(checkpoint), tmp_path / "out"), certify=False)
    assert VersionConfig.read(tmp_path / "out").model.eos_token_ids == (1, 7)


def test_more_rows_than_a_step_has_tokens_still_make_a_valid_version(
    llama_checkpoint: Path, traced: None, tmp_path: Path
) -> None:
    export(ExportConfig(str(llama_checkpoint), tmp_path / "out", max_model_len=64, max_num_seqs=1000), certify=False)
    engine = VersionConfig.read(tmp_path / "out").engine
    assert (engine.max_model_len, engine.max_num_seqs, engine.max_num_batched_tokens) == (64, 1000, 1002)


def test_model_json_holds_the_device_and_the_settings_that_were_asked_for(
    llama_checkpoint: Path, traced: None, tmp_path: Path
) -> None:
    settings = {"cuda_graphs": True, "deterministic": False, "num_speculative_tokens": 3, "max_num_batched_tokens": 99}
    asked = ExportConfig(str(llama_checkpoint), tmp_path / "out", precision="bf16", device="cuda", engine=settings)
    export(asked, certify=False)
    engine = VersionConfig.read(tmp_path / "out").engine
    assert engine.device == "cuda"
    assert {name: getattr(engine, name) for name in settings} == settings


def test_a_context_longer_than_the_model_s_is_refused(llama_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match=r"max_model_len has value 257; .* up to 256 tokens"):
        export(ExportConfig(str(llama_checkpoint), tmp_path / "out", max_model_len=257), certify=False)
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(
    make_checkpoint: Callable[..., Path], traced: None, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint("llama", vocab_size=100)
    with pytest.raises(InvalidCheckpoint, match=r"token id \d+, but the model's vocabulary ends at 99"):
        export(ExportConfig(str(checkpoint), tmp_path / "out"), certify=False)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what takes seconds and is tested elsewhere: tracing and saving the graph."""
    empty = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 20}), ir_version=10)
    monkeypatch.setattr(exporters.decoder_version, "trace", lambda *args: SimpleNamespace(model=empty))
    monkeypatch.setattr(exporters.decoder_version, "save_graph", lambda program, path: path.write_bytes(b"graph"))


@pytest.mark.parametrize("failure", [RuntimeError, ExportCancelled])
def test_a_failure_leaves_nothing_behind(
    failure: type[BaseException], llama_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*args: Any) -> None:
        assert len(list(tmp_path.iterdir())) == 1, "staging lies beside the output"
        raise failure

    monkeypatch.setattr(exporters.decoder_version, "trace", fail)
    with pytest.raises(failure):
        export(ExportConfig(str(llama_checkpoint), tmp_path / "out"), certify=False)
    assert list(tmp_path.iterdir()) == []


def test_events_of_an_export_are_its_steps_in_order(llama_checkpoint: Path, traced: None, tmp_path: Path) -> None:
    events: list[Any] = []
    version = export(ExportConfig(str(llama_checkpoint), tmp_path / "out"), events.append, certify=False)
    assert [event["event"] for event in events] == ["started", *["step"] * 7, "finished"]
    assert [event["step"] for event in events[1:-1]] == ["check", "load", "trace", "fuse", "save", "certify", "seal"]
    assert [event["done"] for event in events[1:-1]] == list(range(7))
    assert events[-1]["digest"] == version.digest
    assert version.passed is None


def make_version(folder: Path, content: str) -> None:
    folder.mkdir()
    (folder / "model.json").write_text(content)
    seal(folder, {}, {})


def test_a_version_is_replaced_only_when_asked(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make_version(out, "old")
    with pytest.raises(OutputExists, match=r"is not empty; .* --overwrite"), staged(out, overwrite=False):
        pass
    with staged(out, overwrite=True) as folder:
        (folder / "model.json").write_text("new")
    assert (out / "model.json").read_text() == "new"
    assert list(tmp_path.iterdir()) == [out]


def test_a_failed_replacement_keeps_the_old_version(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make_version(out, "old")
    with pytest.raises(ExportError), staged(out, overwrite=True):
        raise ExportError("no")
    verify(out)
    assert list(tmp_path.iterdir()) == [out]


def test_a_folder_that_is_no_version_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with (
        pytest.raises(OutputExists, match=r"holds something else \(expected model\.json and"),
        staged(tmp_path / "out", True),
    ):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputExists, match="is not a folder"), staged(tmp_path / "file", True):
        pass


@pytest.mark.parametrize("file", ["adapter.json", "model.onnx"])
def test_a_sealed_folder_of_another_kind_is_never_replaced(tmp_path: Path, file: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / file).write_text("{}")
    seal(tmp_path / "out", {}, {})
    with pytest.raises(OutputExists, match="holds something else"), staged(tmp_path / "out", True):
        pass
    with staged(tmp_path / "out", True, marker=file):
        pass


def test_a_folder_whose_manifest_cannot_be_read_is_never_replaced(tmp_path: Path) -> None:
    make_version(tmp_path / "out", "old")
    (tmp_path / "out" / MANIFEST_JSON).write_text("no manifest")
    with pytest.raises(OutputExists, match="holds something else"), staged(tmp_path / "out", True):
        pass


def test_what_a_killed_export_left_is_removed_by_the_next_one_of_the_same_output(tmp_path: Path) -> None:
    script = "from exporters.version import staged; from pathlib import Path; import os\n"
    script += f"with staged(Path({str(tmp_path / 'out')!r}), False): os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == -9
    (left,) = tmp_path.iterdir()
    (other := tmp_path / ".output.staging.k3f9x2_a").mkdir()
    with staged(tmp_path / "out", overwrite=False) as living:
        assert not left.exists() and other.exists()
        with pytest.raises(OutputExists), staged(tmp_path / "out", overwrite=False):
            # At the same time, as from another container on the same volume.
            assert living.exists()
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "taken").write_text("")
        shutil.rmtree(tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == sorted([other, tmp_path / "out"])


def test_settings_that_nobody_honours_are_a_warning(
    make_checkpoint: Callable[..., Path], traced: None, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint("llama")
    path = checkpoint / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "min_length": 10, "begin_suppress_tokens": [5]}))
    events: list[Any] = []
    export(ExportConfig(str(checkpoint), tmp_path / "out"), events.append, certify=False)
    (warning,) = [event for event in events if event["event"] == "warning"]
    assert warning["settings"] == {"begin_suppress_tokens": [5], "min_length": 10}
    assert "min_length" in warning["message"]


def test_a_default_of_the_wrong_type_is_refused(
    make_checkpoint: Callable[..., Path], traced: None, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint("llama")
    (checkpoint / "generation_config.json").write_text('{"temperature": "hot"}')
    with pytest.raises(InvalidCheckpoint, match=r"generation_config\.json: temperature has value \"hot\"; expected"):
        export(ExportConfig(str(checkpoint), tmp_path / "out"), certify=False)


def test_an_empty_folder_is_used(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with staged(tmp_path / "out", overwrite=False) as folder:
        (folder / "model.json").write_text("new")
    assert (tmp_path / "out" / "model.json").read_text() == "new"


def test_the_context_is_the_model_s_own_unless_asked(llama_checkpoint: Path, traced: None, tmp_path: Path) -> None:
    export(ExportConfig(str(llama_checkpoint), tmp_path / "out"), certify=False)
    config = VersionConfig.read(tmp_path / "out")
    assert config.engine.max_model_len == config.model.max_position_embeddings == 256
