"""What an export is asked to do and what it returns; frozen, checked when built, standard library only."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exporters.errors import InvalidConfig
from exporters.thresholds import Thresholds, thresholds_for
from exporters.usage import StepUsage
from triton_backend.config import EngineConfig
from triton_backend.errors import VersionFolderError

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int4")
DEVICES = ("cpu", "cuda")
CACHE_TYPES = {
    ("fp32", "cpu"): "fp32",
    ("fp16", "cpu"): "fp16",
    ("int8", "cpu"): "fp32",
    ("int4", "cpu"): "fp32",
    ("fp16", "cuda"): "fp16",
    ("bf16", "cuda"): "bf16",
    ("int8", "cuda"): "fp16",
    ("int4", "cuda"): "fp16",
}
"""Precision and device → type of keys and values. The others have no kernel of the attention operator."""
BLOCK_SIZES = (16, 32, 64, 128, 256)
DEFAULT_MAX_MODEL_LEN = 4096
"""Upper bound of max_model_len when none is asked for: cache memory grows with it."""
MAX_NUM_BATCHED_TOKENS = 512
OWN_OPTIONS = ("max_model_len", "max_num_seqs", "max_source_len", "device")
"""Settings of the engine that are options of an export of their own."""
ENGINE_SETTINGS = tuple(f.name for f in dataclasses.fields(EngineConfig) if f.name not in OWN_OPTIONS)


@dataclass(frozen=True)
class ExportConfig:
    """One export.

    checkpoint     a local folder in Hugging Face form, or the id of a model on the Hub
    out            the version folder to write; must not exist, or be empty, unless ``overwrite``
    max_model_len  longest prompt + output in tokens; None: the model's own limit, at most 4096
    max_num_seqs   cache rows, so sequences that can run at once
    precision      what weights are kept and multiplied in
    device         where the version will run, ``cpu`` or ``cuda``: decides what ``int8`` means, and the cache's type
    block_size     int4: weights that share one scale
    accuracy_level int4: 0 computes in fp32, 4 in int8 products
    calibration    int8: text file; scale is moved from outlying activations into weights by what it shows
    max_source_len encoder–decoder: longest source in tokens; None: the model's own limit, at most 1024
    lora_slots     adapters that can be loaded at once; 0 exports a graph without adapters
    lora_rank      largest rank of an adapter
    engine         other settings of the version's engine, by name (``triton_backend.config.EngineConfig``)
    lora_targets   names of the modules that adapters may change, as in PEFT's target_modules
    thresholds     limits of the certificate that differ from the precision's own, by name (``exporters.thresholds``)
    eval_text      text file on which original and version are compared; None: the built-in text
    name           what the model is called, for those who read the events; None: the checkpoint's own name
    overwrite      replace ``out`` if it is a version folder
    """

    checkpoint: str
    out: Path
    max_model_len: int | None = None
    max_num_seqs: int = 32
    precision: str = "fp32"
    device: str = "cpu"
    block_size: int = 32
    accuracy_level: int = 4
    calibration: Path | None = None
    max_source_len: int | None = None
    lora_slots: int = 0
    lora_rank: int = 16
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    engine: Mapping[str, Any] = field(default_factory=dict)
    thresholds: Mapping[str, float] = field(default_factory=dict)
    eval_text: Path | None = None
    name: str | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.max_model_len is not None and self.max_model_len < 2:
            raise InvalidConfig(f"max_model_len has value {self.max_model_len}; expected a whole number ≥ 2")
        if self.max_num_seqs < 1:
            raise InvalidConfig(f"max_num_seqs has value {self.max_num_seqs}; expected a whole number ≥ 1")
        if self.precision not in PRECISIONS:
            raise InvalidConfig(f"precision has value {self.precision!r}; expected one of {', '.join(PRECISIONS)}")
        if self.device not in DEVICES:
            raise InvalidConfig(f"device has value {self.device!r}; expected one of {', '.join(DEVICES)}")
        if (self.precision, self.device) not in CACHE_TYPES:
            found = [precision for precision, device in CACHE_TYPES if device == self.device]
            raise InvalidConfig(
                f"precision has value {self.precision!r}, for which {self.device} has no attention kernel; "
                f"expected one of {', '.join(found)}, or another device"
            )
        if self.calibration is not None and (self.precision, self.device) != ("int8", "cpu"):
            raise InvalidConfig(
                f"calibration is set with precision {self.precision!r} for {self.device}; expected it with int8 for "
                "cpu only, where activations are quantized"
            )
        if self.block_size not in BLOCK_SIZES:
            raise InvalidConfig(f"block_size has value {self.block_size}; expected one of {BLOCK_SIZES}")
        if self.accuracy_level not in (0, 4):
            raise InvalidConfig(f"accuracy_level has value {self.accuracy_level}; expected 0 or 4")
        if self.max_source_len is not None and self.max_source_len < 1:
            raise InvalidConfig(f"max_source_len has value {self.max_source_len}; expected a whole number ≥ 1")
        if self.lora_slots < 0:
            raise InvalidConfig(f"lora_slots has value {self.lora_slots}; expected a whole number ≥ 0")
        if self.lora_rank < 1:
            raise InvalidConfig(f"lora_rank has value {self.lora_rank}; expected a whole number ≥ 1")
        if self.lora_slots and not self.lora_targets:
            raise InvalidConfig("lora_targets is empty; expected module names such as q_proj, or lora_slots = 0")
        for name in ("calibration", "eval_text"):
            path = getattr(self, name)
            if path is not None and not path.is_file():
                raise InvalidConfig(f"{name} has value {str(path)!r}; expected an existing text file")
        _ = self.limits
        self.engine_config(self.max_model_len or DEFAULT_MAX_MODEL_LEN)

    def engine_config(self, max_model_len: int, max_num_batched_tokens: int = MAX_NUM_BATCHED_TOKENS) -> EngineConfig:
        """The settings of the version's engine; raises InvalidConfig if ``engine`` has an unknown name or a bad value.

        ``max_num_batched_tokens`` is what suits the model; it becomes more if so many sequences ask for it.
        """
        for name in self.engine.keys() - set(ENGINE_SETTINGS):
            advice = "it is an option of its own" if name in OWN_OPTIONS else f"expected {', '.join(ENGINE_SETTINGS)}"
            raise InvalidConfig(f"engine setting {name!r} cannot be set; {advice}")
        room = max(max_num_batched_tokens, self.max_num_seqs + 2)
        own = {"max_model_len": max_model_len, "max_num_seqs": self.max_num_seqs, "device": self.device}
        try:
            return EngineConfig(**{**own, "max_num_batched_tokens": room, **self.engine})
        except VersionFolderError as error:
            raise InvalidConfig(f"engine setting {error.args[0]}") from None

    @property
    def limits(self) -> Thresholds:
        """The certificate's limits; raises InvalidConfig if ``thresholds`` has an unknown name or a bad value."""
        return thresholds_for(self.precision, self.thresholds)


def parse_setting(text: str) -> tuple[str, Any]:
    """``deterministic=false`` → its name and value, which is JSON or else text; raises InvalidConfig."""
    name, separator, value = text.partition("=")
    if not separator:
        raise InvalidConfig(f"engine setting {text!r} has no '='; expected NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


@dataclass(frozen=True)
class ExportedVersion:
    """A sealed version folder. ``digest`` is its identity; ``certificate`` the document in certificate.json.

    A version that was not certified has an empty certificate and ``passed`` None. ``sizes`` are the nodes of the graph
    as it was traced and as it was written, ``timings`` what each step took.
    """

    folder: Path
    digest: str
    size_bytes: int
    passed: bool | None
    certificate: Mapping[str, Any] = field(default_factory=dict)
    sizes: Mapping[str, Any] = field(default_factory=dict)
    timings: Mapping[str, StepUsage] = field(default_factory=dict)
