"""An adapter as a graph's slots hold it: rank filled up with zeros, scale in b, columns in the graph's order."""

from __future__ import annotations

import numpy as np

from exporters.adapters.peft_folder import Adapter, LowRank
from exporters.errors import InvalidAdapter, UnsupportedAdapter
from exporters.graph import LAYER
from triton_backend.config import LoraConfig, LoraTarget


def slot_tensors(adapter: Adapter, lora: LoraConfig) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Name of the target → (a (in, rank), b (rank, out)), float32, for every target that the adapter changes.

    Raises UnsupportedAdapter if the graph has no room for it, InvalidAdapter if it was made for another base.
    """
    targets = {target.name: target for target in lora.targets}
    for module in adapter.modules:
        if module not in targets:
            raise _no_slot(adapter, module, lora)
    for target in lora.targets:
        if target.name not in adapter.modules and adapter.changes(target.name):
            raise InvalidAdapter(
                f"{adapter.folder} lacks the matrices of {target.name}, which its target_modules name; it was made for "
                f"another base{_named(adapter)}, or saved in part"
            )
    return {
        name: _fitted(adapter, targets[name], matrices, lora.rank) for name, matrices in sorted(adapter.modules.items())
    }


def _fitted(adapter: Adapter, target: LoraTarget, matrices: LowRank, rank: int) -> tuple[np.ndarray, np.ndarray]:
    found = (matrices.a.shape[1], len(matrices.b))
    if found != (target.in_features, target.out_features):
        raise InvalidAdapter(
            f"{adapter.folder} changes {target.name} from {found[0]} to {found[1]} features; this version's has "
            f"{target.in_features} and {target.out_features}: the adapter was made for another base{_named(adapter)}"
        )
    if matrices.rank > rank:
        raise UnsupportedAdapter(
            f"{adapter.folder} has rank {matrices.rank} for {target.name}; this version has slots of rank {rank}: "
            f"export it again with --lora-rank {adapter.rank}"
        )
    a = np.zeros((target.in_features, rank), np.float32)
    b = np.zeros((rank, target.out_features), np.float32)
    a[:, : matrices.rank] = matrices.a.T
    with np.errstate(over="ignore"):
        scaled = matrices.b.T * np.float32(matrices.scale)
    if not np.isfinite(scaled).all():
        raise InvalidAdapter(
            f"{adapter.folder} has values for {target.name} that become infinite when its scale {matrices.scale:g} is "
            "applied; its training went wrong, or lora_alpha did"
        )
    b[: matrices.rank] = scaled[:, list(target.columns)] if target.columns else scaled
    return a, b


def _no_slot(adapter: Adapter, module: str, lora: LoraConfig) -> Exception:
    kind = module.rpartition(".")[2]
    kinds = sorted({target.name.rpartition(".")[2] for target in lora.targets})
    if kind not in kinds:
        return UnsupportedAdapter(
            f"{adapter.folder} changes {module}; this version has slots for {', '.join(kinds)} only: export it again "
            f"with --lora-targets {','.join(sorted({*kinds, *_kinds(adapter)}))}"
        )
    layers = {int(match[1]) for target in lora.targets if (match := LAYER.search(target.name))}
    match = LAYER.search(module)
    if match and layers and int(match[1]) > max(layers):
        return InvalidAdapter(
            f"{adapter.folder} changes layer {match[1]} ({module}); this version has {max(layers) + 1} layers: the "
            f"adapter was made for another base{_named(adapter)}"
        )
    return InvalidAdapter(
        f"{adapter.folder} changes {module}, which this version does not have; it has, for instance, "
        f"{lora.targets[0].name}: the adapter was made for another base{_named(adapter)}"
    )


def _kinds(adapter: Adapter) -> set[str]:
    return {module.rpartition(".")[2] for module in adapter.modules}


def _named(adapter: Adapter) -> str:
    return f" ({adapter.base_model})" if adapter.base_model else ""
