"""How an encoder's token vectors become one embedding, as the folder of a sentence-transformers model says it.

    modules.json                 the modules in order: Transformer, Pooling, Dense …, Normalize
    1_Pooling/config.json        mean, cls, last or max
    2_Dense/config.json          sizes and activation; 2_Dense/model.safetensors holds linear.weight and linear.bias
    sentence_bert_config.json    max_seq_length, beyond which texts are cut

A folder without modules.json is pooled by the mean, without normalisation. Nothing here needs the model: JSON and
safetensors are read, from inside the folder only. Format: https://sbert.net/docs/sentence_transformer/usage/custom_models.html
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from exporters.errors import InvalidCheckpoint, UnsafeCheckpoint, UnsupportedArchitecture
from triton_backend.config import POOLINGS

MODULES_JSON = "modules.json"
WEIGHTS = "model.safetensors"
MODES = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
    "pooling_mode_max_tokens": "max",
}
"""Flags of 1_Pooling/config.json that have a meaning here."""
ACTIVATIONS: Mapping[str, type[torch.nn.Module]] = {
    "Identity": torch.nn.Identity,
    "Tanh": torch.nn.Tanh,
    "ReLU": torch.nn.ReLU,
    "GELU": torch.nn.GELU,
    "Sigmoid": torch.nn.Sigmoid,
    "SiLU": torch.nn.SiLU,
}


@dataclass(frozen=True)
class Dense:
    """One layer after pooling: ``weight`` (out, in), ``bias`` (out) or None, and the name of its activation."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    activation: str


@dataclass(frozen=True)
class Pooling:
    """Token vectors → ``mode`` → ``dense`` layers in order → L2 normalisation if ``normalize``.

    ``max_tokens`` is the length at which the model's authors cut texts, None if they do not say.
    """

    mode: str = "mean"
    dense: tuple[Dense, ...] = ()
    normalize: bool = False
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.mode not in POOLINGS:
            raise UnsupportedArchitecture(f"pooling has value {self.mode!r}; expected one of {', '.join(POOLINGS)}")


def read_pooling(folder: Path) -> Pooling:
    """The pooling of the checkpoint in ``folder``; raises ExportError that names the module it cannot follow."""
    path = folder / MODULES_JSON
    if not path.exists():
        return Pooling()
    modules = _read_json(path)
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise InvalidCheckpoint(f"{path} is no list of modules; save the model again with sentence-transformers")
    names = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
    num_dense = names.count("Dense")
    order = ["Transformer", "Pooling", *["Dense"] * num_dense]
    if names not in (order, [*order, "Normalize"]):
        raise UnsupportedArchitecture(
            f"{path} lists the modules {', '.join(names)}; expected Transformer, Pooling, then any number of Dense, "
            "then perhaps Normalize"
        )
    folders = [_inside(folder, str(module.get("path", ""))) for module in modules]
    if folders[0] != folder.resolve():
        raise UnsupportedArchitecture(
            f"{path} keeps the Transformer in {modules[0]['path']!r}; expected it in the folder itself: move the files "
            "of that folder up and set its path to ''"
        )
    return Pooling(
        mode=_mode_of(folders[1] / "config.json"),
        dense=tuple(_read_dense(part) for part in folders[2 : 2 + num_dense]),
        normalize=names[-1] == "Normalize",
        max_tokens=_max_tokens(folder / "sentence_bert_config.json"),
    )


def _mode_of(path: Path) -> str:
    config = _read_object(path)
    if "pooling_mode" in config:
        mode = config["pooling_mode"]
        found = [{"lasttoken": "last"}.get(part, part) for part in ([mode] if isinstance(mode, str) else mode)]
    else:
        found = [MODES.get(name, name) for name, is_on in config.items() if name.startswith("pooling_mode_") and is_on]
    if len(found) != 1 or found[0] not in POOLINGS:
        raise UnsupportedArchitecture(
            f"{path} asks for pooling by {' and '.join(map(str, found)) or 'nothing'}; expected exactly one of "
            f"{', '.join(POOLINGS)}"
        )
    return str(found[0])


def _read_dense(folder: Path) -> Dense:
    config = _read_object(folder / "config.json")
    activation = str(config.get("activation_function", "torch.nn.modules.linear.Identity")).rpartition(".")[2]
    if activation not in ACTIVATIONS:
        raise UnsupportedArchitecture(
            f"{folder / 'config.json'} has activation_function {config['activation_function']!r}; expected one of "
            f"{', '.join(sorted(ACTIVATIONS))}"
        )
    path = folder / WEIGHTS
    if not path.is_file():
        raise UnsafeCheckpoint(
            f"{folder} has no {WEIGHTS}; expected the layer's weights as safetensors, never as a pickle: save the "
            "model again with sentence-transformers, which writes them"
        )
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise InvalidCheckpoint(f"cannot read {path} ({error}); download the checkpoint again") from error
    expected = (config.get("out_features"), config.get("in_features"))
    weight, bias = weights.get("linear.weight"), weights.get("linear.bias")
    if weight is None or tuple(weight.shape) != expected:
        shape = None if weight is None else list(weight.shape)
        raise InvalidCheckpoint(
            f"{path} has linear.weight of shape {shape}; its config.json expects {list(expected)}: use the files that "
            "belong together"
        )
    if not all(torch.isfinite(tensor).all() for tensor in weights.values()):
        raise InvalidCheckpoint(f"{path} has NaN or infinite values; expected finite numbers")
    return Dense(weight.float(), None if bias is None else bias.float(), activation)


def _max_tokens(path: Path) -> int | None:
    value = _read_object(path).get("max_seq_length") if path.exists() else None
    return value if isinstance(value, int) and value > 0 else None


def _inside(folder: Path, name: str) -> Path:
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise UnsafeCheckpoint(
            f"{folder / MODULES_JSON} names the path {name!r}, outside the checkpoint; expected a folder inside it"
        )
    return path


def _read_object(path: Path) -> Mapping[str, Any]:
    document = _read_json(path)
    if not isinstance(document, dict):
        raise InvalidCheckpoint(f"{path} holds a JSON {type(document).__name__}; expected an object")
    return document


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidCheckpoint(f"cannot read {path} as JSON ({error}); download the checkpoint again") from error
