"""``python -m exporters.adapters PEFT_FOLDER VERSION_FOLDER OUT``: make an adapter ready for one version.

Events on stdout are JSON lines: ``started``, then ``finished`` or ``error``. Exit codes: 0 written · 1 failed · 2 wrong
usage. OUT is sealed as a version folder is:

    adapter.safetensors  tensors named as the graph's inputs, without the slots' axis
    adapter.json         {"format": 1, "name", "rank", "targets": […], "base": {"digest", "checkpoint"}}
    manifest.json        sha256 of both; written last
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from exporters.__main__ import run_with_events
from exporters.adapters.peft_folder import CONFIG, WEIGHTS, Adapter, open_adapter
from exporters.adapters.slot_tensors import slot_tensors
from exporters.errors import InvalidAdapter, InvalidConfig, InvalidVersion, UnsupportedAdapter
from exporters.events import EmitEvent
from exporters.version import check_output, environment, staged, write_json
from triton_backend.config import VersionConfig
from triton_backend.errors import VersionFolderError
from triton_backend.version_folder import digest, read_manifest, seal, sha256_of

ADAPTER_JSON = "adapter.json"
ADAPTER_WEIGHTS = "adapter.safetensors"
FORMAT = 1
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def convert(
    peft_folder: Path,
    version_folder: Path,
    out: Path,
    *,
    name: str | None = None,
    is_other_base_ok: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the adapter folder ``out`` and return its adapter.json; raises ExportError and then leaves nothing behind.

    ``is_other_base_ok``: the adapter may name another base than the version's, as long as it fits.
    """
    peft_folder, out = peft_folder.absolute(), out.absolute()
    name = name or peft_folder.name
    if not NAME.fullmatch(name):
        raise InvalidConfig(f"name has value {name!r}; expected letters, digits, '.', '_' and '-': pass --name")
    check_output(out, overwrite, ADAPTER_JSON)
    try:
        manifest, config = read_manifest(version_folder), VersionConfig.read(version_folder)
    except VersionFolderError as error:
        raise InvalidVersion(error.args[0]) from error
    lora, checkpoint = config.model.lora, str(manifest.get("source", {}).get("checkpoint", ""))
    if lora is None:
        raise UnsupportedAdapter(
            f"{version_folder} has no slots for adapters; export it again with --lora-slots and --lora-rank"
        )
    adapter = open_adapter(peft_folder)
    if not is_other_base_ok:
        _check_base(adapter, checkpoint)
    matrices = slot_tensors(adapter, lora)
    document = {
        "format": FORMAT,
        "name": name,
        "rank": adapter.rank,
        "targets": list(matrices),
        "base": {"digest": digest(version_folder), "checkpoint": checkpoint},
    }
    tensors: dict[str, np.ndarray] = {}
    for target, (a, b) in matrices.items():
        tensors |= {f"lora.{target}.a": a, f"lora.{target}.b": b}
    with staged(out, overwrite, ADAPTER_JSON) as folder:
        save_file(tensors, folder / ADAPTER_WEIGHTS)
        write_json(folder / ADAPTER_JSON, document)
        files = {file: sha256_of(peft_folder / file) for file in (CONFIG, WEIGHTS)}
        seal(folder, {"adapter": str(peft_folder), "base_model": adapter.base_model, "files": files}, environment())
    return document


def _check_base(adapter: Adapter, checkpoint: str) -> None:
    """Two ids of models on the Hub can be told apart; of folders only what is inside, which ``slot_tensors`` does."""
    if all(HUB_ID.fullmatch(base) for base in (adapter.base_model, checkpoint)) and adapter.base_model != checkpoint:
        raise InvalidAdapter(
            f"{adapter.folder} was trained on {adapter.base_model}; this version was made from {checkpoint}: use a "
            "version of its own base, or pass --other-base if it is meant for both"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)

    def work(emit: EmitEvent) -> int:
        emit({"event": "started", "adapter": str(options.adapter), "out": str(options.out)})
        document = convert(
            options.adapter,
            options.version,
            options.out,
            name=options.name,
            is_other_base_ok=options.other_base,
            overwrite=options.overwrite,
        )
        out = options.out.absolute()
        size_bytes = sum(path.stat().st_size for path in out.iterdir())
        emit({"event": "finished", "folder": str(out), "digest": digest(out), "size_bytes": size_bytes, **document})
        return 0

    return run_with_events(work)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m exporters.adapters", description="Make a PEFT LoRA adapter ready for one version."
    )
    parser.add_argument("adapter", metavar="PEFT_FOLDER", type=Path, help="folder with adapter_config.json")
    parser.add_argument("version", metavar="VERSION_FOLDER", type=Path, help="version exported with --lora-slots")
    parser.add_argument("out", metavar="OUT", type=Path, help="adapter folder to write")
    parser.add_argument("--name", help="what requests will call it (default: the folder's name)")
    parser.add_argument("--other-base", action="store_true", help="accept an adapter that names another base model")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is an adapter folder")
    return parser


if __name__ == "__main__":
    sys.exit(main())
