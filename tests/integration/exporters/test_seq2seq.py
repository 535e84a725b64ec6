"""Encoder–decoders: both graphs together equal PyTorch token for token, for every family that transformers' attention
interface reaches, and a refusal by name for those it does not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from exporters.errors import UnsupportedArchitecture
from exporters.reference_loop import MAX_POSITIONS
from exporters.seq2seq import measure
from tests.integration.exporters.seq2seq_loop import MAX_SOURCE_LEN, Encoder, Seq2SeqLoop, export_graphs, generate

pytestmark = pytest.mark.integration

VOCAB_SIZE = 320
NUM_NEW_TOKENS = 32
SPECIAL_TOKENS: dict[str, Any] = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
BART_SIZES: dict[str, Any] = {
    **SPECIAL_TOKENS,
    "vocab_size": VOCAB_SIZE,
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "max_position_embeddings": 64,
}
T5_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "d_model": 64,
    "d_kv": 24,
    "d_ff": 96,
    "num_layers": 1,
    "num_decoder_layers": 1,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
BERT_SIZES: dict[str, Any] = {
    "model_type": "bert",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
}
GEMMA_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 64,
    "query_pre_attn_scalar": 16,
    "max_position_embeddings": 64,
    "attn_logit_softcapping": 5.0,
}

# name of the case → model_type and its config.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    # The two families with two layers: relative biases that layers share, norms behind and between them.
    "t5": ("t5", {**T5_SIZES, "num_layers": 2, "num_decoder_layers": 2}),
    "bart": ("bart", {**BART_SIZES, "encoder_layers": 2, "decoder_layers": 2}),
    "flan_t5": ("t5", {**T5_SIZES, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "mt5": ("mt5", {**T5_SIZES, "feed_forward_proj": "gated-gelu"}),
    "umt5": ("umt5", {**T5_SIZES, "num_layers": 2, "num_decoder_layers": 2}),
    "mbart": ("mbart", {**BART_SIZES, "scale_embedding": True}),
    "marian": ("marian", {**BART_SIZES, "pad_token_id": 319, "decoder_start_token_id": 319, "scale_embedding": True}),
    "m2m_100": ("m2m_100", {**BART_SIZES, "scale_embedding": True}),
    "pegasus": ("pegasus", {**BART_SIZES, "pad_token_id": 0, "bos_token_id": None, "decoder_start_token_id": 0}),
    "blenderbot": ("blenderbot", {**BART_SIZES, "decoder_layers": 2, "decoder_start_token_id": 0}),
    "blenderbot_small": ("blenderbot-small", BART_SIZES),
    "plbart": ("plbart", BART_SIZES),
    "seamless_m4t": (
        "seamless_m4t",
        {
            **SPECIAL_TOKENS,
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 64,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 96,
            "decoder_ffn_dim": 96,
            "max_position_embeddings": 64,
        },
    ),
    "bert2bert": (
        "encoder-decoder",
        {
            **SPECIAL_TOKENS,
            "encoder": BERT_SIZES,
            "decoder": {**BERT_SIZES, "is_decoder": True, "add_cross_attention": True},
        },
    ),
    # Rotary, grouped heads, soft caps and windows on both sides.
    "t5gemma": (
        "t5gemma",
        {"vocab_size": VOCAB_SIZE, "encoder": GEMMA_SIZES, "decoder": {**GEMMA_SIZES, "sliding_window": 8}},
    ),
}


# name of the case → model_type, its config, and a part of the reason.
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "mvp": ("mvp", BART_SIZES, "attention interface"),
    "led": (
        "led",
        {**BART_SIZES, "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64},
        "attention interface",
    ),
    "longt5": ("longt5", T5_SIZES, "1 encoder layers, of which 0 use"),
    "pegasus_x": ("pegasus_x", {**BART_SIZES, "block_size": 8}, "1 encoder layers, of which 0 use"),
    "bigbird_pegasus": ("bigbird_pegasus", BART_SIZES, "1 encoder layers, of which 0 use"),
}
PREFIX_LENS = (11, 1, 2, 3, 6, 1, 8, 4)
CHUNKS = ((2, 3, 6), (1,), (2,), (3,), (2, 4), (1,), (3, 5), (4,))
SOURCE_LENS = (19, 3, 1, MAX_SOURCE_LEN, 7, 8, 2, 30)
assert all(sum(sizes) == length for sizes, length in zip(CHUNKS, PREFIX_LENS, strict=True))


def make_model(model_type: str, sizes: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(model_type, **sizes)).eval().float()
    for parameter in filter(lambda parameter: parameter.requires_grad, model.parameters()):  # not sinusoids
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
        else:  # norms and biases that are not just ones and zeros
            parameter.data += 0.2 * torch.randn_like(parameter)
    if hasattr(model, "final_logits_bias"):
        torch.nn.init.normal_(model.final_logits_bias, std=0.2)
    return model


@dataclass(frozen=True)
class Exported:
    """A family's model and graphs, and eight rows to decode. ``pad`` is never chosen: it may have no position."""

    model: Any
    folder: Path
    sources: list[list[int]]
    prefixes: list[list[int]]
    pad: int

    def loop(self, rows: Sequence[int]) -> Seq2SeqLoop:
        loop = Seq2SeqLoop(self.folder, len(rows), MAX_POSITIONS)
        for place, row in enumerate(rows):
            loop.place(place, self.sources[row])
        return loop


# Their graphs have the nodes of flan_t5's and bart's.
SIBLINGS = ("mt5", "blenderbot_small", "plbart")


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.sibling if name in SIBLINGS else ()) for name in FAMILIES],
)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return _export(request.param, tmp_path_factory.mktemp(request.param))


def _export(name: str, folder: Path) -> Exported:
    model = make_model(*FAMILIES[name])
    generator = torch.Generator().manual_seed(1)

    def tokens(length: int) -> list[int]:
        found: list[int] = torch.randint(3, VOCAB_SIZE - 1, (length,), generator=generator).tolist()
        return found

    start = getattr(model.config, "decoder_start_token_id", None) or 0
    return Exported(
        model=model,
        folder=export_graphs(model, folder),
        sources=[tokens(length) for length in SOURCE_LENS],
        prefixes=[[start, *tokens(length - 1)] for length in PREFIX_LENS],
        pad=model.config.pad_token_id,
    )


def test_tokens_equal_generate_for_ragged_rows_and_prefixes_in_chunks(exported: Exported) -> None:
    expected = [
        generate(exported.model, source, prefix, NUM_NEW_TOKENS, banned=[exported.pad])
        for source, prefix in zip(exported.sources, exported.prefixes, strict=True)
    ]
    found, logits = exported.loop(range(8)).decode(exported.prefixes, CHUNKS, NUM_NEW_TOKENS, banned=[exported.pad])
    assert found == expected

    text = [*exported.prefixes[0], *found[0]]
    with torch.no_grad():
        original = exported.model(
            input_ids=torch.tensor([exported.sources[0]]), decoder_input_ids=torch.tensor([text])
        ).logits[0, len(exported.prefixes[0]) - 1 : -1]
    np.testing.assert_allclose(logits[:, 0], original.numpy(), atol=1e-4)


def test_row_is_the_same_to_the_bit_whatever_is_beside_it_and_however_its_prefix_is_cut(exported: Exported) -> None:
    everything = exported.loop(range(8)).decode(exported.prefixes, CHUNKS, 4)[1]
    for row, chunks in ((0, (4, 7)), (2, (2,)), (6, (8,))):
        alone = exported.loop([row]).decode([exported.prefixes[row]], [chunks], 4)[1]
        np.testing.assert_array_equal(alone[:, 0], everything[:, row])


def test_padding_does_not_change_what_the_encoder_says(exported: Exported) -> None:
    encode = Encoder(exported.folder / "encoder.onnx")
    padded = encode(exported.sources, pad_token_id=exported.pad)
    for row, source in enumerate(exported.sources):
        for name, alone in encode([source]).items():
            np.testing.assert_allclose(padded[name][row, :, : len(source)], alone[0], atol=2e-5)


def test_self_attention_reads_one_product_and_turns_it_by_itself(exported: Exported) -> None:
    has_rotary = any("Rotary" in type(module).__name__ for module in exported.model.modules())
    for name in ("encoder.onnx", "model.onnx"):
        graph = onnx.load(str(exported.folder / name), load_external_data=False).graph
        nodes = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
        packed = [node for node in nodes if node.input[1] == ""]
        turned = [node for node in packed if any(attribute.name == "do_rotary" for attribute in node.attribute)]
        assert len(packed) == len(nodes) if name == "encoder.onnx" else len(packed) == len(nodes) / 2
        assert turned == (packed if has_rotary else [])


@pytest.fixture(scope="module")
def bart(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return _export("bart", tmp_path_factory.mktemp("bart"))


def test_graphs_have_the_contract_s_tensors(bart: Exported) -> None:
    def describe(values: Any) -> dict[str, tuple[int, tuple[Any, ...]]]:
        types = {value.name: value.type.tensor_type for value in values}
        return {
            name: (kind.elem_type, tuple(dim.dim_param or dim.dim_value for dim in kind.shape.dim))
            for name, kind in types.items()
        }

    def states(tensor: str, length: str) -> dict[str, tuple[int, tuple[Any, ...]]]:
        names = [f"{tensor}.{layer}.{part}" for layer in range(2) for part in ("key", "value")]
        return dict.fromkeys(names, (onnx.TensorProto.FLOAT, ("batch", 4, length, 16)))

    tokens, row = (onnx.TensorProto.INT64, ("batch", "sequence")), (onnx.TensorProto.INT32, ("batch",))
    encoder = onnx.load(str(bart.folder / "encoder.onnx"), load_external_data=False).graph
    assert describe(encoder.input) == {"input_ids": tokens, "attention_mask": tokens}
    assert describe(encoder.output) == states("cross", "sequence")
    decoder = onnx.load(str(bart.folder / "model.onnx"), load_external_data=False).graph
    assert describe(decoder.input) == {
        "input_ids": tokens,
        "position_ids": tokens,
        "seqlens_k": row,
        "total_sequence_length": (onnx.TensorProto.INT32, ()),
        "logits_index": (onnx.TensorProto.INT64, ("positions",)),
        **states("past_key_values", "max_len"),
        **states("cross", "max_source_len"),
        "source_lens": row,
    }
    assert describe(decoder.output) == {
        "logits": (onnx.TensorProto.FLOAT, ("positions", VOCAB_SIZE)),
        "top_logits": (onnx.TensorProto.FLOAT, ("positions", 64)),
        "top_ids": (onnx.TensorProto.INT64, ("positions", 64)),
        **states("present", "max_len"),
    }


def test_decoder_layer_projects_no_source_and_has_two_attention_nodes(bart: Exported) -> None:
    graph = onnx.load(str(bart.folder / "model.onnx"), load_external_data=False).graph
    nodes = [node for node in graph.node if "/layers.1/" in node.name]
    kinds = Counter(node.op_type for node in nodes)
    # qkv, out, q, out, fc1, fc2; queries have biases of their own, the others are added by what reads the products:
    # three norms that also add what came before, and the activation.
    assert kinds == {"MatMul": 6, "Add": 2, "GroupQueryAttention": 2, "SkipLayerNormalization": 3, "BiasGelu": 1}
    assert not any("encoder_attn.k_proj" in tensor.name for tensor in graph.initializer)


def test_forced_first_token_is_the_second_of_the_prefix(bart: Exported) -> None:
    expected = generate(bart.model, bart.sources[0], [2], 8, forced_bos_token_id=7)
    assert expected[0] == 7
    found, _ = bart.loop([0]).decode([[2, 7]], [(2,)], 7)
    assert found[0] == expected[1:]


def test_row_without_a_source_disturbs_nobody(bart: Exported) -> None:
    text = [[2], [2]]
    expected = bart.loop([0]).decode(text[:1], [(1,)], 4)[1]
    loop = bart.loop([0, 1])
    loop.source_lens[1] = 0
    _, logits = loop.decode(text, [(1,), (1,)], 4)
    np.testing.assert_array_equal(logits[:, 0], expected[:, 0])
    assert np.isfinite(logits).all()


def test_top_logits_are_the_largest(bart: Exported) -> None:
    result = bart.loop([0]).run(0, np.array([bart.prefixes[0]]), [0])
    np.testing.assert_array_equal(result["top_logits"][0], np.sort(result["logits"][0])[::-1][:64])
    np.testing.assert_array_equal(result["logits"][0][result["top_ids"][0]], result["top_logits"][0])


def test_graphs_are_the_same_function_before_they_are_fused(bart: Exported, tmp_path: Path) -> None:
    unfused = export_graphs(bart.model, tmp_path, fused=False)
    loop = Seq2SeqLoop(unfused, 1, MAX_POSITIONS)
    loop.place(0, bart.sources[0])
    expected = bart.loop([0]).decode(bart.prefixes[:1], CHUNKS[:1], 3)[1]
    np.testing.assert_allclose(loop.decode(bart.prefixes[:1], CHUNKS[:1], 3)[1], expected, atol=1e-4)


def test_tracing_leaves_the_model_as_it_was(bart: Exported) -> None:
    names = {name for name, _ in make_model(*FAMILIES["bart"]).named_buffers()}
    assert {name for name, _ in bart.model.named_buffers()} == names
    assert not any("forward" in vars(module) for module in bart.model.modules())


@pytest.mark.parametrize("name", list(REFUSED))
def test_model_outside_the_interface_is_refused_by_name(name: str) -> None:
    model_type, sizes, reason = REFUSED[name]
    model = make_model(model_type, sizes)
    with pytest.raises(UnsupportedArchitecture, match=type(model).__name__) as refusal:
        measure(model)
    assert reason in str(refusal.value)
