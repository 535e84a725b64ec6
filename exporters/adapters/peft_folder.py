"""A folder saved by PEFT, checked before anything of it is used.

Kinds of adapters that are more than a product of two matrices beside a linear layer are refused by name: served as if
they were, they would give other answers than those they were trained for. No code runs and no pickle is read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch

from exporters.checkpoint import PICKLE_SUFFIXES, check_links, read_json, tensors_of
from exporters.errors import InvalidAdapter, InvalidCheckpoint, UnsafeCheckpoint, UnsupportedAdapter

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")

MORE_THAN_LORA = {
    "use_dora": "DoRA scales the columns of the adapted weight by a norm that depends on both",
    "modules_to_save": "it replaces whole modules of its base",
    "trainable_token_indices": "it replaces embeddings of its base",
    "target_parameters": "it changes parameters that are no linear layer",
    "layer_replication": "it repeats layers of its base",
    "alora_invocation_tokens": "it acts on a part of the tokens only",
    "lora_bias": "it adds a bias",
    "use_qalora": "it pools its inputs",
    "use_bdlora": "its matrices are block-diagonal and shared",
    "arrow_config": "it routes between adapters",
    "kasa_config": "it scales its matrices by singular values",
    "monteclora_config": "it samples its matrices",
    "velora_config": "it projects its inputs",
}
"""Setting → what makes such an adapter more than a product of two matrices."""

UNDERSTOOD = {
    *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "init_lora_weights"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "base_model_name_or_path"),
}
WITHOUT_EFFECT = {
    *("auto_mapping", "inference_mode", "lora_dropout", "fan_in_fan_out", "peft_version", "revision", "task_type"),
    *("corda_config", "eva_config", "loftq_config", "lora_ga_config", "megatron_config", "megatron_core"),
    *("ensure_weight_tying", "qalora_group_size", "runtime_config"),
}
"""Settings of training, merging or starting weights; what was learnt is in the tensors."""

INITIAL_WEIGHTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Ways to start that leave the base as it is; others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change its weights, too."""


@dataclass(frozen=True)
class LowRank:
    """What is added to one linear layer: ``scale · (x·aᵀ)·bᵀ`` with a (r, in) and b (out, r)."""

    a: np.ndarray
    b: np.ndarray
    scale: float

    @property
    def rank(self) -> int:
        return len(self.a)


@dataclass(frozen=True)
class Adapter:
    """An adapter that passed every check: module path in the base model → its matrices."""

    folder: Path
    config: Mapping[str, Any]
    modules: Mapping[str, LowRank]

    @property
    def base_model(self) -> str:
        return str(self.config.get("base_model_name_or_path") or "")

    @property
    def rank(self) -> int:
        """The largest of any module."""
        return max(matrices.rank for matrices in self.modules.values())

    def changes(self, module: str) -> bool:
        """Whether its config says that it adapts ``module``; the rules are PEFT's."""
        if _is_named(self.config.get("exclude_modules"), module):
            return False
        targets: str | list[str] = self.config["target_modules"]
        if not _is_named(targets, module):
            return False
        layers = self.config.get("layers_to_transform")
        if isinstance(targets, str) or layers in (None, []) or module in targets:
            return True
        patterns = self.config.get("layers_pattern") or r"[^.]*"
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            if match := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module):
                return int(match[1]) in ([layers] if isinstance(layers, int) else layers)
        return False


def open_adapter(folder: Path) -> Adapter:
    """Read a PEFT folder. Raises InvalidAdapter if it is incomplete or damaged, UnsupportedAdapter if it holds another
    kind of adapter, UnsafeCheckpoint if it holds pickles or links to outside.
    """
    if not (folder / CONFIG).is_file():
        raise InvalidAdapter(f"{folder} has no {CONFIG}; expected a folder saved by PEFT's save_pretrained")
    check_links(folder)
    if not (folder / WEIGHTS).is_file():
        raise _without_weights(folder)
    try:
        config = read_json(folder / CONFIG)
        names = tensors_of(folder / WEIGHTS)
    except InvalidCheckpoint as error:
        raise InvalidAdapter(str(error)) from error
    _check_kind(folder, config)
    _check_numbers(folder, config)
    try:
        modules = _read_modules(folder, config, names)
        for module in modules:
            Adapter(folder, config, modules).changes(module)
    except re.error as error:
        raise InvalidAdapter(
            f"{folder / CONFIG} has the pattern {error.pattern!r}, which is no regex: {error}"
        ) from error
    return Adapter(folder, config, modules)


def _without_weights(folder: Path) -> Exception:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if not pickles:
        return InvalidAdapter(f"{folder} has no {WEIGHTS}; save the adapter again with PEFT's save_pretrained")
    return UnsafeCheckpoint(
        f"{folder / pickles[0]} is a pickle file, which can run any code when it is read; expected {WEIGHTS}: on a "
        "machine you can afford to lose, load the adapter with PEFT and save it with save_pretrained, which writes "
        "safetensors"
    )


def _check_kind(folder: Path, config: Mapping[str, Any]) -> None:
    path = folder / CONFIG
    if config.get("peft_type") != "LORA":
        raise UnsupportedAdapter(f"{path} has peft_type {config.get('peft_type')!r}; expected 'LORA'")
    if config.get("bias", "none") != "none":
        raise UnsupportedAdapter(
            f"{path} has bias {config['bias']!r}: the adapter changes biases of its base; expected 'none': merge it "
            "into its base and export that"
        )
    for name, reason in MORE_THAN_LORA.items():
        if config.get(name) not in (None, False, [], {}):
            raise UnsupportedAdapter(
                f"{path} has {name} {config[name]!r}: {reason}, which the slots of a graph cannot do; merge it into "
                "its base (merge_and_unload) and export that"
            )
    if config.get("init_lora_weights") not in INITIAL_WEIGHTS:
        raise UnsupportedAdapter(
            f"{path} has init_lora_weights {config['init_lora_weights']!r}, which changes the weights of the base, "
            "too; save it with path_initial_model_for_weight_conversion, so that it fits the base as it was"
        )
    for name, value in config.items():
        if name not in UNDERSTOOD | WITHOUT_EFFECT | set(MORE_THAN_LORA) and value not in (None, False, "", [], {}):
            raise UnsupportedAdapter(
                f"{path} has {name} {value!r}, a setting that is not known here and may change what the adapter does; "
                "if it has no effect after training, remove it"
            )


def _check_numbers(folder: Path, config: Mapping[str, Any]) -> None:
    numbers: list[tuple[str, Any, Any]] = [("r", config.get("r"), int)]
    numbers.append(("lora_alpha", config.get("lora_alpha"), (int, float)))
    for name, kind in (("rank_pattern", int), ("alpha_pattern", (int, float))):
        pattern = config.get(name) or {}
        if not isinstance(pattern, dict):
            raise InvalidAdapter(f"{folder / CONFIG} has {name} {pattern!r}; expected patterns and their values")
        numbers += [(f"{name} for {key!r}", value, kind) for key, value in pattern.items()]
    for what, value, kind in numbers:
        if not isinstance(value, kind) or isinstance(value, bool) or value <= 0:
            raise InvalidAdapter(f"{folder / CONFIG} has {what} {value!r}; expected a number greater than 0")
    for name in ("target_modules", "exclude_modules"):
        value = config.get(name)
        is_names = isinstance(value, list) and all(isinstance(module, str) for module in value)
        if not (is_names or isinstance(value, str) or (value is None and name == "exclude_modules")):
            raise InvalidAdapter(f"{folder / CONFIG} has {name} {value!r}; expected names of modules, or a regex")


def _read_modules(folder: Path, config: Mapping[str, Any], names: set[str]) -> dict[str, LowRank]:
    sides: dict[str, dict[str, np.ndarray]] = {}
    path = folder / WEIGHTS
    with safetensors.safe_open(path, "pt") as tensors:
        for name in sorted(names):
            match = TENSOR.fullmatch(name)
            if match is None:
                raise UnsupportedAdapter(
                    f"{path} holds {name}, which is no matrix beside a linear layer (embeddings, biases and whole "
                    "modules cannot be kept in a slot); train the adapter without it, or merge it into its base"
                )
            sides.setdefault(match["module"], {})[match["side"]] = _matrix(path, name, tensors.get_tensor(name))
    if not sides:
        raise InvalidAdapter(f"{path} holds no tensors; save the adapter again with PEFT's save_pretrained")
    return {module: _low_rank(path, config, module, found) for module, found in sides.items()}


def _matrix(path: Path, name: str, tensor: torch.Tensor) -> np.ndarray:
    if not tensor.is_floating_point() or tensor.dim() != 2:
        raise InvalidAdapter(
            f"{name} in {path} has type {tensor.dtype} and shape {list(tensor.shape)}; expected a matrix of floats"
        )
    matrix = tensor.float().numpy()
    if not np.isfinite(matrix).all():
        raise InvalidAdapter(f"{name} in {path} holds NaN or infinite values; its training went wrong, or the file did")
    return matrix


def _low_rank(path: Path, config: Mapping[str, Any], module: str, sides: Mapping[str, np.ndarray]) -> LowRank:
    for side in "AB":
        if side not in sides:
            raise InvalidAdapter(f"{path} lacks lora_{side} of {module}; save the adapter again")
    rank = int(_by_pattern(config.get("rank_pattern"), module, config["r"]))
    alpha = float(_by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"]))
    a, b = sides["A"], sides["B"]
    if len(a) != rank or b.shape[1] != rank:
        raise InvalidAdapter(
            f"{path} has rank {len(a)} (lora_A) and {b.shape[1]} (lora_B) for {module}; {CONFIG} says {rank}: these "
            "files are not of the same adapter"
        )
    return LowRank(a, b, alpha / (rank**0.5 if config.get("use_rslora") else rank))


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that ``module`` ends with, as PEFT looks it up."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _is_named(names: Any, module: str) -> bool:
    """Whether a regex, or a list of paths and last parts of paths, names ``module``."""
    if not names:
        return False
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)
