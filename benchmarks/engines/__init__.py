"""The engines that are measured, as a table; each kind is one module that prepares a checkpoint and loads it.

A module has two functions and runs in its engine's own environment and process:

    prepare(checkpoint, out, precision)                         checkpoint → this engine's files in ``out``
    load(checkpoint, folder, precision, limits) → generate      ``folder`` is what prepare wrote
    generate(prompts, num_new) → Generation                     greedy, all prompts at once

For benchmarks.serving it also has

    SERVED_BY                                                   how requests reach it, for the table
    RUNS_BATCHES = True                                         if a batch must end before the next one begins
    serve(checkpoint, folder, precision, limits) → serve(loop)  answers a ClosedLoop, by the fairest interface it has
    beam_search(checkpoint, folder, precision, limits) → search(prompts, width, num_new)    if it has beams

``prepare``, ``load`` and the others raise Unavailable where an engine cannot do what is asked, and the table says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class Unavailable(Exception):
    """This engine cannot be measured here; the message says why."""


@dataclass(frozen=True)
class EngineSpec:
    """One row of the table.

    ``precision`` is what weights are kept in (fp32, fp16, int8, int4): engines are compared within one precision.
    ``peer``: runs in .venv-bench, not in .venv. ``packages``: whose versions a result names, the first being the engine
    itself. ``sources``: files that decide what ``prepare`` writes, besides the module and the packages' versions.
    ``files``: the engine whose prepared files it reads, if not its own. ``measured``: the benchmarks that it takes part
    in, on ``device``.
    """

    label: str
    precision: str
    module: str
    packages: tuple[str, ...]
    peer: bool = True
    sources: tuple[str, ...] = ()
    files: str = ""
    measured: tuple[str, ...] = ("export", "serving")
    device: str = "cpu"


_LLMOS = ("exporters/**/*.py", "triton_backend/*.py")
_LLMOS_PACKAGES = ("llmos", "onnxruntime-gpu", "torch", "transformers")
_BARE_PACKAGES = ("onnxruntime-gpu",)
_TORCH_PACKAGES = ("transformers", "torch")
_EXPORT, _SERVING = ("export",), ("serving",)
_GPU: dict[str, Any] = {"peer": False, "measured": _EXPORT, "device": "cuda"}
BARE = "bare ONNX Runtime"
"""The label of llmos's own graphs run by nothing but ONNX Runtime: the limit that serving is measured against."""

ENGINES: dict[str, EngineSpec] = {
    "llmos-fp32": EngineSpec("llmos", "fp32", "llmos", _LLMOS_PACKAGES, peer=False, sources=_LLMOS),
    "llmos-int8": EngineSpec("llmos", "int8", "llmos", _LLMOS_PACKAGES, peer=False, sources=_LLMOS),
    "llmos-int4": EngineSpec("llmos", "int4", "llmos", _LLMOS_PACKAGES, peer=False, sources=_LLMOS, measured=_EXPORT),
    "bare-fp32": EngineSpec(BARE, "fp32", "bare", _BARE_PACKAGES, peer=False, files="llmos-fp32", measured=_SERVING),
    "bare-int8": EngineSpec(BARE, "int8", "bare", _BARE_PACKAGES, peer=False, files="llmos-int8", measured=_SERVING),
    "transformers-sdpa": EngineSpec("transformers sdpa", "fp32", "torch_sdpa", _TORCH_PACKAGES),
    "transformers-eager": EngineSpec("transformers eager", "fp32", "torch_eager", _TORCH_PACKAGES, measured=_EXPORT),
    "transformers-continuous": EngineSpec(
        "transformers continuous", "fp32", "torch_continuous", _TORCH_PACKAGES, measured=_SERVING
    ),
    "ctranslate2-fp32": EngineSpec("CTranslate2", "fp32", "ct2", ("ctranslate2",)),
    "ctranslate2-int8": EngineSpec("CTranslate2", "int8", "ct2", ("ctranslate2",)),
    "genai-fp32": EngineSpec("onnxruntime-genai", "fp32", "genai", ("onnxruntime-genai", "onnxruntime")),
    "genai-int4": EngineSpec("onnxruntime-genai", "int4", "genai", ("onnxruntime-genai", "onnxruntime")),
    "llama.cpp-f32": EngineSpec("llama.cpp f32", "fp32", "llama_cpp_python", ("llama-cpp-python", "gguf")),
    "llama.cpp-q8_0": EngineSpec("llama.cpp q8_0", "int8", "llama_cpp_python", ("llama-cpp-python", "gguf")),
    "llama.cpp-q4_0": EngineSpec("llama.cpp q4_0", "int4", "llama_cpp_python", ("llama-cpp-python", "gguf")),
    # On a machine with a GPU there is one environment, that of llmos.
    "llmos-cuda": EngineSpec("llmos", "fp16", "llmos_cuda", _LLMOS_PACKAGES, sources=_LLMOS, **_GPU),
    "llmos-cuda-graphs": EngineSpec(
        "llmos, CUDA graphs", "fp16", "llmos_cuda_graphs", _LLMOS_PACKAGES, sources=_LLMOS, **_GPU
    ),
    "transformers-cuda": EngineSpec("transformers sdpa", "fp16", "torch_cuda", _TORCH_PACKAGES, **_GPU),
}
OURS = "llmos"
"""The label that the others' ratios refer to."""
REFERENCE = "transformers-sdpa"
"""The original, whose module also has a function ``judge``: what it thinks of the others' tokens."""
REFERENCES = {"cpu": REFERENCE, "cuda": "transformers-cuda"}


@dataclass(frozen=True)
class Limits:
    """What an engine is loaded for: threads of its pool, most rows at once, most tokens of a row."""

    num_threads: int
    max_rows: int
    max_tokens: int


@dataclass
class Generation:
    """Tokens of each row, and when they were known.

    ``marks_s[0]`` is the start, ``marks_s[k]`` the time at which the k-th token of all rows was known: ``marks_s[1] −
    marks_s[0]`` is the prefill, and every later difference is one decode step.
    """

    tokens: list[list[int]]
    marks_s: list[float] = field(default_factory=list)


Prompts = Sequence[Sequence[int]]
Generate = Callable[[Prompts, int], Generation]
Load = Callable[[Path, Path, str, Limits], Generate]
BeamSearch = Callable[[Prompts, int, int], list[list[int]]]
"""(prompts, width, number of new tokens) → the best beam of each prompt."""


def stepwise(prefill: Callable[[Prompts], list[int]], step: Callable[[list[int]], list[int]]) -> Generate:
    """The ``generate`` of an engine that is driven step by step: both functions return one token per row."""

    def generate(prompts: Prompts, num_new: int) -> Generation:
        marks = [time.perf_counter()]
        newest = prefill(prompts)
        marks.append(time.perf_counter())
        steps = [newest]
        while len(steps) < num_new:
            newest = step(newest)
            marks.append(time.perf_counter())
            steps.append(newest)
        return Generation([list(row) for row in zip(*steps, strict=True)], marks)

    return generate
