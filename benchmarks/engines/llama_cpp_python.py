"""llama.cpp through the C interface of llama-cpp-python, on a GGUF file of the same weights.

f32 is written here with the ``gguf`` package; q8_0 and q4_0 are made of it by llama.cpp's own quantizer, as its users
do. The rotary of llama.cpp's ``llama`` architecture turns neighbouring pairs, a checkpoint's turns halves: the rows of
the query and key weights are reordered. The cache is f16 and attention is flash, its defaults; with weights in f32 the
cache is f32 and attention is not flash, because either makes its tokens differ from the checkpoint's.

llama-cpp-python's own server answers one request after the other. Serving here is what llama.cpp's server does: every
step computes the next token of all running rows and as much of waiting prompts as the batch has room for.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.engines import Generate, Limits, Prompts, Unavailable, stepwise
from benchmarks.engines.closed_loop import Arrival, ClosedLoop, Serve

SERVED_BY = "llama_decode, continuous batches"
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
MAX_BATCH, MAX_UBATCH = 2048, 512
"""Tokens of a step, and of one pass through the graph: the defaults of llama.cpp's server."""


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
    rows = _Rows(folder, precision, limits)

    def prefill(prompts: Prompts) -> list[int]:
        rows.clear()
        return [rows.run({row: prompt}, [row])[row] for row, prompt in enumerate(prompts)]

    def step(tokens: list[int]) -> list[int]:
        newest = rows.run({row: [token] for row, token in enumerate(tokens)}, range(len(tokens)))
        return [newest[row] for row in range(len(tokens))]

    return stepwise(prefill, step)


def serve(checkpoint: Path, folder: Path, precision: str, limits: Limits) -> Serve:
    rows = _Rows(folder, precision, limits)

    def serve_clients(loop: ClosedLoop) -> None:
        rows.clear()
        clients = _Clients(loop)
        while not loop.is_done:
            clients.answer(rows)

    return serve_clients


class _Clients:
    """Which request runs in which row, and what each row has still to compute."""

    def __init__(self, loop: ClosedLoop) -> None:
        self._loop = loop
        self._free = list(range(loop.num_clients))
        self._arrivals: dict[int, Arrival] = {}
        self._todo: dict[int, list[int]] = {}

    def answer(self, rows: _Rows) -> None:
        """One step: rows that decode first, then prompts in order of arrival."""
        for arrival in self._loop.arrivals():
            row = self._free.pop()
            rows.clear(row)
            self._arrivals[row], self._todo[row] = arrival, list(arrival.prompt)
        inputs: dict[int, list[int]] = {}
        room = MAX_BATCH
        for row in sorted(self._todo, key=lambda row: len(self._todo[row]) > 1):
            if room:
                inputs[row], self._todo[row] = self._todo[row][:room], self._todo[row][room:]
                room -= len(inputs[row])
        for row, token in rows.run(inputs, [row for row in inputs if not self._todo[row]]).items():
            self._todo[row] = [token]
            if self._loop.token(self._arrivals[row].index, token):
                del self._todo[row]
                self._free.append(row)


class _Rows:
    """A context of llama.cpp with a sequence per row."""

    def __init__(self, folder: Path, precision: str, limits: Limits) -> None:
        import llama_cpp

        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_load_from_file(
            str(folder / f"{precision}.gguf").encode(), llama_cpp.llama_model_default_params()
        )
        if not model:
            raise Unavailable("llama_model_load_from_file returned nothing")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = limits.max_rows * limits.max_tokens
        params.n_seq_max = limits.max_rows
        params.n_batch, params.n_ubatch = MAX_BATCH, MAX_UBATCH
        params.n_threads = params.n_threads_batch = limits.num_threads
        params.no_perf = True
        if precision == "fp32":
            params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
            params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._context = llama_cpp.llama_init_from_model(model, params)
        if not self._context:
            raise Unavailable("llama_init_from_model returned nothing")
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self._batch = llama_cpp.llama_batch_init(MAX_BATCH, 0, 1)
        self._lengths = [0] * limits.max_rows

    def clear(self, row: int = -1) -> None:
        """Forget what one row holds, or every row."""
        import llama_cpp

        llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(self._context), row, -1, -1)
        for each in range(len(self._lengths)) if row < 0 else (row,):
            self._lengths[each] = 0

    def run(self, inputs: dict[int, Sequence[int]] | dict[int, list[int]], wanted: Sequence[int]) -> dict[int, int]:
        """Compute the next tokens of rows; returns the greedy token after them for the rows in ``wanted``."""
        import llama_cpp
        import numpy as np

        batch, index, order = self._batch, 0, []
        for row, tokens in inputs.items():
            for offset, token in enumerate(tokens):
                batch.token[index] = token
                batch.pos[index] = self._lengths[row] + offset
                batch.n_seq_id[index] = 1
                batch.seq_id[index][0] = row
                batch.logits[index] = row in wanted and offset == len(tokens) - 1
                index += 1
            self._lengths[row] += len(tokens)
            order += [row] if row in wanted else []
        batch.n_tokens = index
        code = llama_cpp.llama_decode(self._context, batch)
        if code:
            raise RuntimeError(f"llama_decode returned {code} for {index} tokens")
        if not order:
            return {}
        # Rows of logits come in the order of the batch, for the tokens that asked for them.
        logits: Any = np.ctypeslib.as_array(
            llama_cpp.llama_get_logits(self._context), shape=(len(order), self._vocab_size)
        )
        return dict(zip(order, logits.argmax(axis=1).tolist(), strict=True))
