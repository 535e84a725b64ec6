"""Which products of a fused graph belong to which linear layers of the model, and in which order their features lie."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from transformers.pytorch_utils import Conv1D

from exporters.errors import InvalidConfig, UnsupportedArchitecture
from exporters.fusions.rewriting import PARTS, constant, dims, module_of, only_user
from exporters.graph import WRAPPER_SCOPE
from triton_backend.config import LoraTarget


@dataclass(frozen=True)
class Part:
    """``width`` features of a product: the output of ``target``, or of a module that adapters leave alone."""

    width: int
    target: LoraTarget | None


@dataclass(frozen=True)
class Product:
    """``input`` (B, S, in) times a constant matrix, plus its bias if any, is ``output`` (B, S, out)."""

    input: ir.Value
    output: ir.Value
    parts: tuple[Part, ...]

    @property
    def targets(self) -> list[LoraTarget]:
        return [part.target for part in self.parts if part.target is not None]


def linear_modules(torch_model: torch.nn.Module, targets: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Path → (in_features, out_features) of every linear layer that is a target."""
    linear: dict[str, tuple[int, int]] = {}
    for path, module in torch_model.named_modules():
        if isinstance(module, torch.nn.Linear):
            linear[path] = (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            linear[path] = (module.nx, module.nf)
    known = {path.rpartition(".")[2] for path in linear}
    if unknown := sorted(set(targets) - known):
        raise InvalidConfig(
            f"lora_targets has value {unknown[0]!r}; {type(torch_model).__name__} has the linear layers "
            f"{', '.join(sorted(known))}: name some of these"
        )
    return {path: sizes for path, sizes in linear.items() if path.rpartition(".")[2] in targets}


def find_products(graph: ir.Graph, modules: Mapping[str, tuple[int, int]]) -> list[Product]:
    """Those that compute at least one of ``modules``, in the graph's order."""
    products = []
    for node in graph:
        if node.op_type != "MatMul" or node.inputs[0] is None or constant(node.inputs[1]) is None:
            continue
        output = _with_bias(node)
        shape = dims(output)
        if shape is None or len(shape) != 3 or shape[0] != "batch" or not isinstance(shape[2], int):
            continue
        sides = node.meta.get(PARTS) or [(module_of(node), np.arange(shape[2]))]
        parts = tuple(_part(module.removeprefix(WRAPPER_SCOPE), columns, modules) for module, columns in sides)
        if any(part.target is not None for part in parts):
            products.append(Product(node.inputs[0], output, parts))
    return products


def _part(module: str, columns: np.ndarray, modules: Mapping[str, tuple[int, int]]) -> Part:
    if module not in modules:
        return Part(len(columns), None)
    in_features, out_features = modules[module]
    if not np.array_equal(np.sort(columns), np.arange(out_features)):
        return Part(len(columns), None)  # the graph has some features twice, or not at all
    is_straight = np.array_equal(columns, np.arange(out_features))
    order = () if is_straight else tuple(columns.tolist())
    return Part(len(columns), LoraTarget(module, in_features, out_features, order))


def _with_bias(product: ir.Node) -> ir.Value:
    """What comes after the bias is what adapters change: ONNX Runtime may compute product and bias in one node."""
    value = product.outputs[0]
    add = only_user(value)
    if add is None or add.op_type != "Add":
        return value
    other = add.inputs[1] if add.inputs[0] is value else add.inputs[0]
    bias = constant(other)
    return add.outputs[0] if bias is not None and bias.ndim == 1 else value


def check_found(modules: Iterable[str], products: Sequence[Product], torch_model: torch.nn.Module) -> None:
    """Raise UnsupportedArchitecture unless every one of ``modules`` is part of exactly one product."""
    found = [target.name for product in products for target in product.targets]
    for module in modules:
        if found.count(module) != 1:
            raise UnsupportedArchitecture(
                f"{module} of {type(torch_model).__name__} is a product of its own {found.count(module)} times in the "
                "graph; expected once, so that adapters can change it: leave "
                f"{module.rpartition('.')[2]!r} out of lora_targets"
            )
