"""Encoders: embeddings equal to PyTorch's, whatever stands beside a text or under its padding."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

from exporters.checkpoint import open_checkpoint
from exporters.config import ExportConfig
from exporters.embedder import Embedder, EmbedderProcess, embed, pad
from exporters.encoder import BidirectionalAttention, EmbeddingStep, is_encoder, load_encoder, measure, trace
from exporters.encoder_certificate import certify_encoder, original_embedding
from exporters.encoder_version import write_encoder
from exporters.errors import InvalidCheckpoint, InvalidConfig, UnsafeCheckpoint, UnsupportedArchitecture
from exporters.events import Progress
from exporters.fusions import fuse
from exporters.graph import save_graph
from exporters.pipeline import _check_asked
from exporters.pooling import Dense, Pooling, read_pooling
from tests.integration.exporters.conftest import VOCAB_SIZE
from triton_backend.config import VersionConfig

pytestmark = pytest.mark.integration

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "cls_token_id": 0,
    "sep_token_id": 1,
}
# model_type → what its config adds, and whether its attention becomes one node.
FAMILIES: dict[str, tuple[dict[str, Any], bool]] = {
    "bert": ({"num_hidden_layers": 2}, True),
    "roberta": ({}, True),
    "distilbert": ({"dim": 64, "hidden_dim": 128, "n_layers": 1, "n_heads": 4}, True),
    "electra": ({"embedding_size": 32}, True),
    "albert": ({"embedding_size": 32, "num_hidden_layers": 2}, True),
    # One layer sees everything, the other a window of 8: shorter than the texts.
    "modernbert": ({"num_hidden_layers": 2, "global_attn_every_n_layers": 2, "local_attention": 8}, True),
    "nomic_bert": ({}, True),
    "eurobert": ({"num_key_value_heads": 2}, True),
    "qwen3": ({"num_key_value_heads": 2, "head_dim": 16}, True),
    "layoutlm": ({}, True),  # its mask is one row for all tokens
    "mpnet": ({}, False),
    "deberta-v2": ({"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}, False),
}
ROTARY = ("modernbert", "nomic_bert")
"""Families whose queries and keys are turned by a node each; those of heads that share keys are not."""
ROWS = [list(range(3, 3 + length)) for length in (23, 4, 1, 50)]
TOLERANCE = 2e-5


def make_encoder(model_type: str, seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    sizes = {**SIZES, **(FAMILIES[model_type][0] if model_type in FAMILIES else {}), **changes}
    model = AutoModel.from_config(AutoConfig.for_model(model_type, **sizes)).eval().float()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def export_encoder(model: Any, pooling: Pooling, folder: Path, max_tokens: int = 64) -> Path:
    program = trace(model, pooling)
    fuse(program.model, max_tokens)
    save_graph(program, folder / "model.onnx")
    return folder / "model.onnx"


@pytest.fixture(scope="session")
def make_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Callable[..., Path]:
    """Writes a checkpoint folder; ``modules`` are sentence-transformers modules that follow the Transformer."""

    def make(model_type: str = "bert", seed: int = 0, modules: tuple[str, ...] = (), **changes: Any) -> Path:
        folder = tmp_path_factory.mktemp("encoder") / model_type
        make_encoder(model_type, seed, **changes).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if modules:
            names = ("Transformer", *modules)
            paths = ["" if name == "Transformer" else f"{index}_{name}" for index, name in enumerate(names)]
            listed = [
                {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{name}"}
                for index, (name, path) in enumerate(zip(names, paths, strict=True))
            ]
            (folder / "modules.json").write_text(json.dumps(listed))
            for path in paths[1:]:
                (folder / path).mkdir()
        return folder

    return make


def write_dense(folder: Path, num_out: int, num_in: int = 64, seed: int = 7) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = {
        "linear.weight": torch.randn(num_out, num_in, generator=generator) / 8,
        "linear.bias": torch.randn(num_out, generator=generator),
    }
    config = {"in_features": num_in, "out_features": num_out, "bias": True}
    config["activation_function"] = "torch.nn.modules.activation.Tanh"  # type: ignore[assignment]
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    return weights


@pytest.mark.parametrize("model_type", FAMILIES)
def test_embeddings_of_a_ragged_batch_equal_those_of_each_text_alone_in_pytorch(
    model_type: str, tmp_path: Path
) -> None:
    model, pooling = make_encoder(model_type), Pooling()
    shape = measure(model, pooling)
    expected = np.stack([original_embedding(model, pooling, row) for row in ROWS])

    path = export_encoder(model, pooling, tmp_path)

    np.testing.assert_allclose(Embedder(path)(ROWS), expected, atol=TOLERANCE)
    after = original_embedding(model, pooling, ROWS[0])
    np.testing.assert_array_equal(after, expected[0], "tracing must leave the model as it was")
    nodes = Counter(node.op_type for node in onnx.load(str(path), load_external_data=False).graph.node)
    assert shape.has_attention_nodes == FAMILIES[model_type][1]
    assert nodes["MultiHeadAttention"] == (len(shape.layers) if shape.has_attention_nodes else 0)
    assert nodes["RotaryEmbedding"] == (2 * len(shape.layers) if model_type in ROTARY else 0)


def test_rotary_is_right_up_to_the_longest_text(tmp_path: Path) -> None:
    model = make_encoder("nomic_bert", max_position_embeddings=200)
    rows = [torch.randint(3, VOCAB_SIZE, (length,)).tolist() for length in (200, 90)]
    expected = np.stack([original_embedding(model, Pooling("last"), row) for row in rows])
    found = Embedder(export_encoder(model, Pooling("last"), tmp_path, max_tokens=200))(rows)
    np.testing.assert_allclose(found, expected, atol=10 * TOLERANCE)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    model = make_encoder("bert")
    return model, export_encoder(model, Pooling(normalize=True), tmp_path_factory.mktemp("bert"))


def test_what_stands_under_the_padding_and_how_much_of_it_there_is_changes_nothing(bert: tuple[Any, Path]) -> None:
    embedder = Embedder(bert[1])
    alone = np.concatenate([embedder([row]) for row in ROWS])
    ids, mask = pad(ROWS, 64)
    ids[mask == 0] = np.random.default_rng(0).integers(0, VOCAB_SIZE, int((mask == 0).sum()))
    np.testing.assert_allclose(embedder.run(ids, mask)["embeddings"], alone, atol=1e-6)
    assert np.abs(alone[0] - alone[1]).max() > 0.01, "different texts must have different embeddings"


def test_a_row_without_tokens_is_finite_and_disturbs_no_other(bert: tuple[Any, Path]) -> None:
    embedder = Embedder(bert[1])
    ids, mask = pad([*ROWS, []])
    outputs = embedder.run(ids, mask)
    assert all(np.isfinite(output).all() for output in outputs.values())
    np.testing.assert_allclose(outputs["embeddings"][:-1], embedder(ROWS), atol=1e-6)


def test_token_vectors_are_those_of_the_model(bert: tuple[Any, Path]) -> None:
    model, path = bert
    outputs = Embedder(path).run(*pad(ROWS[:2]))
    for row, tokens in enumerate(ROWS[:2]):
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([tokens]))[0][0].numpy()
        np.testing.assert_allclose(outputs["last_hidden_state"][row, : len(tokens)], expected, atol=TOLERANCE)
    np.testing.assert_allclose(np.linalg.norm(outputs["embeddings"], axis=-1), 1, atol=1e-6)


def test_a_bert_layer_has_ten_nodes(bert: tuple[Any, Path]) -> None:
    graph = onnx.load(str(bert[1]), load_external_data=False).graph
    layer = [node.op_type for node in graph.node if node.name.startswith("/encoder/layer.0/")]
    assert Counter(layer) == {"MatMul": 6, "MultiHeadAttention": 1, "SkipLayerNormalization": 2, "BiasGelu": 1}


@pytest.mark.parametrize("mode", ["mean", "cls", "last", "max"])
def test_every_pooling_is_that_of_the_text_alone(mode: str) -> None:
    model = make_encoder("bert")
    dense = (Dense(torch.randn(24, 64), None, "Tanh"), Dense(torch.randn(16, 24), torch.randn(16), "Identity"))
    pooling = Pooling(mode, dense, normalize=True)
    step = EmbeddingStep(model, pooling, BidirectionalAttention()).eval()
    ids, mask = (torch.from_numpy(array) for array in pad([*ROWS, []]))
    with torch.no_grad():
        hidden = model(input_ids=ids, attention_mask=mask)[0]
        found = step.embed(hidden, mask).numpy()
    expected = np.stack([original_embedding(model, pooling, row) for row in ROWS])
    np.testing.assert_allclose(found[:-1], expected, atol=1e-5)
    assert np.isfinite(found[-1]).all()
    assert measure(model, pooling).embedding_size == 16


def test_a_sentence_transformers_folder_is_exported_with_its_modules_and_certified(
    make_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_folder(modules=("Pooling", "Dense", "Normalize"))
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_lasttoken": True}))
    weights = write_dense(folder / "2_Dense", 32)
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 48}))
    checkpoint = open_checkpoint(str(folder))
    assert is_encoder(checkpoint)

    steps: list[str] = []
    sizes = write_encoder(ExportConfig(str(folder), tmp_path), checkpoint, tmp_path, steps.append).graph

    assert steps == ["load", "trace", "fuse", "save"]
    assert sizes["fused"]["num_nodes"] < sizes["traced"]["num_nodes"]
    config = VersionConfig.read(tmp_path)
    assert (config.model.kind, config.model.pooling, config.model.normalize) == ("encoder", "last", True)
    assert (config.model.embedding_size, config.engine.max_model_len) == (32, 48)
    model = load_encoder(checkpoint)
    with torch.no_grad():
        last = model(input_ids=torch.tensor([ROWS[0]]))[0][0, -1]
        expected = torch.nn.functional.normalize(
            torch.tanh(weights["linear.weight"] @ last + weights["linear.bias"]), dim=0
        )
    np.testing.assert_allclose(embed(tmp_path, ROWS[:2])[0], expected.numpy(), atol=TOLERANCE)

    done: list[Any] = []
    certificate = certify_encoder(tmp_path, checkpoint, Progress(done.append, ("certify",)))
    assert certificate["passed"] is True
    assert certificate["summary"]["num_texts"] >= 16
    assert certificate["summary"]["max_difference"] < 1e-4
    assert certificate["summary"]["min_cosine"] > 0.99999
    assert min(text["num_tokens"] for text in certificate["texts"]) == 1
    assert max(text["num_tokens"] for text in certificate["texts"]) == 48
    assert certificate["tokenizer"]["num_different"] == 0
    assert certificate["speed"]["tokens_per_s"] > 0
    assert certificate["memory"]["peak_rss_bytes"] > certificate["memory"]["size_bytes"] > 0
    assert [event["done"] for event in done] == sorted({event["done"] for event in done})
    assert done[-1]["done"] == done[-1]["total"]
    json.dumps(certificate)

    (folder / "2_Dense" / "model.safetensors").unlink()
    write_dense(folder / "2_Dense", 32, seed=8)
    assert certify_encoder(tmp_path, checkpoint, Progress(done.append, ("certify",)))["passed"] is False
    with pytest.raises(InvalidCheckpoint, match=r"embeddings of 32 numbers, .* of 64; expected the checkpoint"):
        certify_encoder(tmp_path, open_checkpoint(str(make_folder())), Progress(done.append, ("certify",)))


def test_a_model_without_modules_is_pooled_by_the_mean(make_folder: Callable[..., Path]) -> None:
    assert read_pooling(make_folder()) == Pooling("mean", (), normalize=False, max_tokens=None)


def test_a_pooling_flag_that_is_off_and_a_named_pooling_are_understood(make_folder: Callable[..., Path]) -> None:
    folder = make_folder(modules=("Pooling",))
    path = folder / "1_Pooling" / "config.json"
    path.write_text(json.dumps({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}))
    assert read_pooling(folder).mode == "cls"
    path.write_text(json.dumps({"pooling_mode": "lasttoken"}))
    assert read_pooling(folder).mode == "last"


def test_a_pooling_that_is_not_exported_is_named(make_folder: Callable[..., Path]) -> None:
    folder = make_folder(modules=("Pooling",))
    path = folder / "1_Pooling" / "config.json"
    path.write_text(json.dumps({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}))
    with pytest.raises(UnsupportedArchitecture, match=r"pooling by mean and max; expected exactly one of"):
        read_pooling(folder)
    path.write_text(json.dumps({"pooling_mode_weightedmean_tokens": True}))
    with pytest.raises(UnsupportedArchitecture, match="pooling_mode_weightedmean_tokens"):
        read_pooling(folder)


def test_modules_that_cannot_be_followed_are_named(make_folder: Callable[..., Path]) -> None:
    with pytest.raises(UnsupportedArchitecture, match="Transformer, Pooling, CNN; expected"):
        read_pooling(make_folder(modules=("Pooling", "CNN")))


def test_a_module_outside_the_folder_is_refused(make_folder: Callable[..., Path]) -> None:
    folder = make_folder(modules=("Pooling",))
    text = (folder / "modules.json").read_text()
    (folder / "modules.json").write_text(text.replace("1_Pooling", "../1_Pooling"))
    with pytest.raises(UnsafeCheckpoint, match=r"'\.\./1_Pooling', outside the checkpoint"):
        read_pooling(folder)


def test_a_dense_layer_as_a_pickle_or_of_another_size_is_refused(make_folder: Callable[..., Path]) -> None:
    folder = make_folder(modules=("Pooling", "Dense"))
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    dense = folder / "2_Dense"
    write_dense(dense, 32)
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps({**config, "out_features": 33}))
    with pytest.raises(InvalidCheckpoint, match=r"shape \[32, 64\]; its config.json expects \[33, 64\]"):
        read_pooling(folder)
    (dense / "model.safetensors").rename(dense / "pytorch_model.bin")
    with pytest.raises(UnsafeCheckpoint, match="never as a pickle"):
        read_pooling(folder)


def test_positions_of_the_roberta_family_end_earlier(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    model = make_encoder("roberta")
    assert measure(model, Pooling()).max_tokens == 64 - 3
    checkpoint = open_checkpoint(str(make_folder("roberta")))
    with pytest.raises(InvalidConfig, match="max_model_len has value 62; this model has positions for 61 tokens"):
        write_encoder(ExportConfig(checkpoint.source, tmp_path, max_model_len=62), checkpoint, tmp_path, print)


def test_a_model_that_mixes_padding_into_its_texts_is_refused() -> None:
    model = make_encoder("convbert", head_ratio=2, conv_kernel_size=3)
    with pytest.raises(UnsupportedArchitecture, match="ConvBertModel gives a text other vectors when padding follows"):
        measure(model, Pooling())


def test_a_decoder_is_no_encoder_unless_it_comes_with_pooling(
    make_folder: Callable[..., Path], llama_checkpoint: Path
) -> None:
    assert not is_encoder(open_checkpoint(str(llama_checkpoint)))
    assert is_encoder(open_checkpoint(str(make_folder("roberta"))))
    assert is_encoder(open_checkpoint(str(make_folder("qwen3", modules=("Pooling",)))))


@pytest.mark.parametrize("kind", ["encoder", "encoder_decoder"])
def test_bf16_is_for_decoders(kind: str, tmp_path: Path) -> None:
    asked = ExportConfig("checkpoint", tmp_path, precision="bf16", device="cuda")
    _check_asked(asked, "decoder")
    with pytest.raises(
        InvalidConfig, match=f"precision has value 'bf16', in which an {kind} cannot be proven; .* fp16"
    ):
        _check_asked(asked, kind)


def test_embeddings_that_are_no_numbers_fail_by_name(
    make_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder()
    checkpoint = open_checkpoint(str(folder))
    write_encoder(ExportConfig(str(folder), tmp_path), checkpoint, tmp_path, print)
    embedding = EmbedderProcess.__call__
    monkeypatch.setattr(
        EmbedderProcess,
        "__call__",
        lambda self, rows: replace(found := embedding(self, rows), embeddings=found.embeddings * np.nan),
    )
    certificate = certify_encoder(tmp_path, checkpoint, Progress(lambda event: None, ("certify",)))
    assert certificate["passed"] is False
    assert "embeddings_not_finite" in certificate["summary"]["failed"]


def test_weights_that_do_not_fit_are_named(make_folder: Callable[..., Path]) -> None:
    folder = make_folder()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(InvalidCheckpoint, match=r"lacks 16 weights .*encoder\.layer\.2\.attention"):
        load_encoder(open_checkpoint(str(folder)))
