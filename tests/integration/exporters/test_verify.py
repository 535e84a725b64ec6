"""A version's proof, run again: where the original is, where it is not, and on folders that nobody should trust."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from exporters import ExportConfig, export
from exporters.artifact import check_version
from exporters.errors import InvalidCheckpoint, InvalidVersion
from exporters.verify import verify
from triton_backend.version_folder import MANIFEST_JSON, read_manifest, seal

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def certified(llama_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A version with its certificate. Shared and read only."""
    out = tmp_path_factory.mktemp("certified") / "1"
    export(ExportConfig(str(llama_checkpoint), out, max_model_len=48, max_num_seqs=8))
    return out


@pytest.fixture
def copy(certified: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(certified, tmp_path / "version"))


def reseal(folder: Path, change: Callable[[dict[str, Any]], Any] = lambda source: None) -> None:
    """Seal ``folder`` again, as someone would who changed it on purpose."""
    source = read_manifest(folder)["source"]
    change(source)
    (folder / MANIFEST_JSON).unlink()
    seal(folder, source, {})


def test_where_the_original_is_the_whole_proof_is_repeated(certified: Path, llama_checkpoint: Path) -> None:
    events: list[Any] = []
    found = verify(certified, emit=events.append)
    assert found.passed is True
    assert (found.original, found.reason) == (str(llama_checkpoint), None)
    assert found.repetition is not None
    assert found.repetition.num_equal == found.repetition.num_prompts >= 16
    assert found.repetition.max_logit_difference == pytest.approx(0, abs=1e-4)
    assert found.found["num_equal"] == found.recorded["num_equal"]
    assert [event["step"] for event in events if event["event"] == "step"] == ["check", "certify", "repeat"]
    json.dumps(events, allow_nan=False)


def test_without_the_original_the_recorded_tokens_are_repeated(copy: Path) -> None:
    reseal(copy, lambda source: source.update(checkpoint="/somewhere/else"))
    found = verify(copy)
    assert found.passed is True
    assert found.original is None
    assert found.reason is not None and "'/somewhere/else' is not on this machine" in found.reason
    assert found.repetition is not None and found.repetition.num_mismatches == 0
    assert found.found == {}

    certificate = json.loads((copy / "certificate.json").read_text())
    certificate["tokens"][3]["token_ids"][5] += 1
    (copy / "certificate.json").write_text(json.dumps(certificate))
    reseal(copy)
    other = verify(copy)
    assert other.passed is False
    assert other.repetition is not None and other.repetition.num_mismatches == 1


def test_a_proof_that_was_run_again_decides_and_not_the_recorded_one(copy: Path) -> None:
    certificate = json.loads((copy / "certificate.json").read_text())
    (copy / "certificate.json").write_text(json.dumps({**certificate, "passed": False}))
    reseal(copy)
    assert verify(copy).passed is True
    reseal(copy, lambda source: source.update(checkpoint="/somewhere/else"))
    assert verify(copy).passed is False


def test_another_checkpoint_is_not_taken_for_the_original(
    certified: Path, make_checkpoint: Callable[..., Path]
) -> None:
    with pytest.raises(InvalidCheckpoint, match=r"model\.safetensors is not the file that this version was made from"):
        verify(certified, str(make_checkpoint("llama", seed=1)))


def test_a_version_without_certificate_and_original_cannot_be_verified(llama_version: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama_version, tmp_path / "version"))
    reseal(folder, lambda source: source.update(checkpoint="/somewhere/else"))
    with pytest.raises(InvalidVersion, match=r"no recorded tokens to repeat, .* --checkpoint PATH"):
        verify(folder)


def test_the_program_says_by_its_exit_code_what_it_found(copy: Path) -> None:
    def run(*arguments: str) -> tuple[int, dict[str, Any]]:
        command = [sys.executable, "-m", "exporters.verify", str(copy), *arguments]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
        return result.returncode, json.loads(result.stdout.splitlines()[-1])

    exit_code, last = run("--threshold", "max_kl_mean=0")
    assert (exit_code, last["event"], last["passed"]) == (3, "finished", False)
    assert last["found"]["failed"] == ["max_kl_mean"]
    (copy / "tokenizer.json").write_text("{}")
    exit_code, last = run()
    assert (exit_code, last["event"], last["code"]) == (1, "error", "INVALID_VERSION")
    assert "tokenizer.json" in last["message"]


def refused(folder: Path, words: str) -> None:
    with pytest.raises(InvalidVersion, match=words):
        check_version(folder)


def test_a_changed_missing_or_additional_file_is_named(copy: Path) -> None:
    with (copy / "model.onnx.data").open("r+b") as stream:
        stream.write(b"\1")
    refused(copy, r"model\.onnx\.data differs from manifest")
    (copy / "model.onnx.data").unlink()
    refused(copy, r"model\.onnx\.data is missing")
    reseal(copy)
    (copy / "extra.so").write_bytes(b"\x7fELF")
    refused(copy, r"extra\.so is not listed")
    refused(copy / "nothing", "is not a folder")


def test_links_are_refused(copy: Path, tmp_path: Path) -> None:
    os.link(copy / "model.json", tmp_path / "second-name")
    refused(copy, r"model\.json has 2 hard links; .* copy the folder")
    (tmp_path / "second-name").unlink()
    check_version(copy)
    shutil.move(copy / "model.json", tmp_path / "model.json")
    (copy / "model.json").symlink_to(tmp_path / "model.json")
    refused(copy, r"model\.json is not a plain file")


@pytest.mark.parametrize("location", ["/etc/passwd", "../model.onnx.data", "sub/../../x", "", "not-listed.data"])
def test_weights_outside_the_folder_are_refused(copy: Path, location: str) -> None:
    model = onnx.load(copy / "model.onnx", load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.external_data)
    next(entry for entry in tensor.external_data if entry.key == "location").value = location
    onnx.save(model, copy / "model.onnx")
    reseal(copy)
    refused(copy, f"looks for the weight {tensor.name} in {location!r}; expected a file beside it")


def test_weights_outside_the_folder_are_found_in_nested_graphs_and_constants(copy: Path) -> None:
    outside = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[1], data_location=1)
    outside.external_data.add(key="location", value="/etc/passwd")
    constant = onnx.helper.make_node("Constant", [], ["c"], value=outside)
    branch = onnx.helper.make_graph([constant], "branch", [], [])
    nested = onnx.helper.make_node("If", ["x"], ["y"], then_branch=branch, else_branch=branch)
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([nested], "g", [], [])), copy / "other.onnx")
    reseal(copy)
    refused(copy, "looks for the weight w in '/etc/passwd'")


def test_weights_behind_the_end_of_their_file_are_refused(copy: Path) -> None:
    model = onnx.load(copy / "model.onnx", load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.external_data)
    next(entry for entry in tensor.external_data if entry.key == "length").value = str(1 << 40)
    onnx.save(model, copy / "model.onnx")
    reseal(copy)
    refused(copy, "looks for the weight .* at bytes")


def test_a_file_that_is_no_graph_is_refused(copy: Path) -> None:
    (copy / "model.onnx").write_bytes(b"no graph at all")
    reseal(copy)
    refused(copy, r"model\.onnx is not an ONNX model")
