"""llama.cpp through the C interface of llama-cpp-python, on a GGUF file of the same weights.

f32 is written here with the ``gguf`` package; q8_0 and q4_0 are made of it by llama.cpp's own quantizer, as its users
do. The rotary of llama.cpp's ``llama`` architecture turns neighbouring pairs, a checkpoint's turns halves: the rows of
the query and key weights are reordered. The cache is f16, its default.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.engines import Generate, Limits, Prompts, Unavailable, stepwise

LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
MAX_UBATCH = 512


def prepare(checkpoint: Path, out: Path, precision: str) -> None:
    f32 = out / "f32.gguf"
    write_gguf(checkpoint, f32)
    if precision != "fp32":
        import llama_cpp

        kinds = {"int8": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "int4": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0}
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = kinds[precision]
        params.nthread = 1
        code = llama_cpp.llama_model_quantize(
            str(f32).encode(), str(out / f"{precision}.gguf").encode(), ctypes.byref(params)
        )
        f32.unlink()
        if code:
            raise Unavailable(f"llama_model_quantize returned {code}")
    else:
        f32.rename(out / "fp32.gguf")


def write_gguf(checkpoint: Path, path: Path) -> None:
    import gguf
    from safetensors import safe_open

    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] != "llama":
        raise Unavailable(f"a GGUF file is written here for model_type 'llama'; this is {config['model_type']!r}")
    num_heads, num_kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_size = config.get("head_dim") or config["hidden_size"] // num_heads

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(num_heads)
    writer.add_head_count_kv(num_kv_heads)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_rope_dimension_count(head_size)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("none")  # only token ids go in and come out

    with safe_open(checkpoint / "model.safetensors", "np") as tensors:

        def add(name: str, source: str, heads: int | None = None) -> None:
            data = tensors.get_tensor(source).astype("float32")
            if heads is not None:
                data = data.reshape(heads, 2, head_size // 2, -1).swapaxes(1, 2).reshape(data.shape).copy()
            writer.add_tensor(name, data)

        add("token_embd.weight", "model.embed_tokens.weight")
        add("output_norm.weight", "model.norm.weight")
        if not config["tie_word_embeddings"]:
            add("output.weight", "lm_head.weight")
        for layer in range(config["num_hidden_layers"]):
            for name, source in LAYER_NAMES.items():
                heads = {"attn_q": num_heads, "attn_k": num_kv_heads}.get(name)
                add(f"blk.{layer}.{name}.weight", f"model.layers.{layer}.{source}.weight", heads)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def load(checkpoint: Path, folder: Path, precision: str, limits: Limits) -> Generate:
    import llama_cpp
    import numpy as np

    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(
        str(folder / f"{precision}.gguf").encode(), llama_cpp.llama_model_default_params()
    )
    if not model:
        raise Unavailable("llama_model_load_from_file returned nothing")
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = limits.max_rows * limits.max_tokens
    params.n_seq_max = limits.max_rows
    params.n_batch = limits.max_tokens
    params.n_ubatch = MAX_UBATCH
    params.n_threads = params.n_threads_batch = limits.num_threads
    params.no_perf = True
    context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        raise Unavailable("llama_init_from_model returned nothing")
    vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    batch = llama_cpp.llama_batch_init(params.n_batch, 0, 1)
    lengths: list[int] = []

    def run(rows: dict[int, Sequence[int]]) -> list[int]:
        index = 0
        for row, tokens in rows.items():
            for offset, token in enumerate(tokens):
                batch.token[index] = token
                batch.pos[index] = lengths[row] + offset
                batch.n_seq_id[index] = 1
                batch.seq_id[index][0] = row
                batch.logits[index] = offset == len(tokens) - 1
                index += 1
            lengths[row] += len(tokens)
        batch.n_tokens = index
        code = llama_cpp.llama_decode(context, batch)
        if code:
            raise RuntimeError(f"llama_decode returned {code} for {index} tokens")
        # Rows of logits come in the order of the batch, for the tokens that asked for them.
        logits: Any = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), shape=(len(rows), vocab_size))
        return [int(token) for token in logits.argmax(axis=1)]

    def prefill(prompts: Prompts) -> list[int]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        lengths[:] = [0] * len(prompts)
        return [run({row: prompt})[0] for row, prompt in enumerate(prompts)]

    def step(tokens: list[int]) -> list[int]:
        return run({row: [token] for row, token in enumerate(tokens)})

    return stepwise(prefill, step)
