"""Sessions of exporters and engine: products of bytes never saturate, and an encoder runs where it will be served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import pytest

import exporters.embedder
import triton_backend.cpu_features
from exporters.embedder import Embedder
from exporters.session import open_session
from triton_backend.config import EngineConfig, LayerConfig, ModelConfig, VersionConfig
from triton_backend.session import load_session

pytestmark = pytest.mark.integration


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    value = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy"]
    nodes = [onnx.helper.make_node("Abs", ["x"], ["y"])]
    graph = onnx.helper.make_graph(nodes, "g", value[:1], value[1:])
    model = onnx.helper.make_model(graph, ir_version=10, opset_imports=[onnx.helper.make_opsetid("", 20)])
    onnx.save(model, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


@pytest.mark.parametrize("has_vnni", [True, False])
def test_bytes_are_multiplied_without_saturation_on_every_cpu(
    has_vnni: bool, graph: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_backend.cpu_features, "has_vnni", lambda: has_vnni)
    for session in (load_session(graph, 1), open_session(graph, "cpu", ort.SessionOptions())):
        options = session.get_session_options()
        if has_vnni:
            with pytest.raises(RuntimeError):
                options.get_session_config_entry("session.x64quantprecision")
        else:
            assert options.get_session_config_entry("session.x64quantprecision") == "1"


def test_an_encoder_runs_on_the_device_of_its_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ModelConfig("B", "bert", 9, 64, (LayerConfig(1, 8),), 0, kind="encoder", pooling="mean", embedding_size=8)
    VersionConfig(model, EngineConfig(64, device="cuda")).write(tmp_path)
    opened: list[Any] = []
    monkeypatch.setattr(exporters.embedder, "open_session", lambda graph, device, options: opened.append(device))
    Embedder.of(tmp_path)
    assert opened == ["cuda"]
