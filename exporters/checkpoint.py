"""A checkpoint on disk, checked before anything of it is trusted.

Nothing here runs code of a checkpoint or needs PyTorch: JSON files and safetensors headers are read, and whatever is
missing, damaged or unsafe is refused with what to do about it. What is left to ``original`` is what only a loaded
model shows: weights that do not fit the config, or are not finite.

safetensors: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporters.errors import InvalidCheckpoint, UnsafeCheckpoint, UnsupportedArchitecture, reason_of

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
CONFIG_PATTERNS = ("*.json", "*.jinja")
SAFE_PATTERNS = (*CONFIG_PATTERNS, "*.safetensors")
"""Files fetched from the Hub: all that an export reads, none that can hold code."""
UNUSED_PATTERNS = ("[!0-9]*/*", "consolidated*")
"""Other forms of the same weights, which would only double the download; sentence-transformers numbers its folders."""

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Checkpoint:
    """A folder that passed every check. ``source`` is what the user named; ``files`` are the weight files."""

    folder: Path
    source: str
    config: Mapping[str, Any]
    generation_config: Mapping[str, Any]
    files: tuple[Path, ...]

    @property
    def model_type(self) -> str:
        return str(self.config["model_type"])

    def tensor_shapes(self) -> dict[str, tuple[tuple[int, ...], Path]]:
        """Shape and file of every weight, from the headers of the files."""
        return {
            name: (tuple(entry["shape"]), path) for path in self.files for name, entry in _header_of(path)[0].items()
        }


def open_checkpoint(source: str, *, with_weights: bool = True) -> Checkpoint:
    """Check the folder ``source`` (or fetch the Hub model of that id first); raises ExportError with the reason.

    Without weights, those of a Hub model are not fetched, and ``files`` is then empty.
    """
    folder = Path(source)
    is_local = folder.is_dir()
    if not is_local:
        folder = _fetch(source, SAFE_PATTERNS if with_weights else CONFIG_PATTERNS)
    check_links(folder)
    config = _read_config(folder)
    _check_no_custom_code(folder, config)
    if not (folder / "tokenizer.json").is_file():
        raise InvalidCheckpoint(
            f"{folder} has no tokenizer.json; expected a fast tokenizer: load the tokenizer with "
            "AutoTokenizer.from_pretrained and save it with save_pretrained into this folder"
        )
    read_json(folder / "tokenizer.json")
    generation_config = read_json(folder / "generation_config.json", missing_ok=True)
    files = _check_weights(folder) if with_weights or is_local else ()
    return Checkpoint(folder, source, config, generation_config, files)


def _fetch(model_id: str, patterns: tuple[str, ...]) -> Path:
    if model_id.startswith((".", "/", "~")) or model_id.count("/") > 1:
        raise InvalidCheckpoint(f"{model_id} is not a folder; expected a checkpoint folder or the id of a Hub model")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model_id, allow_patterns=[*patterns], ignore_patterns=[*UNUSED_PATTERNS]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InvalidCheckpoint(
            f"{model_id} is neither a folder nor a model that could be fetched from the Hub "
            f"({reason_of(error)}); check the name and the network, or download it "
            "yourself and pass the folder"
        ) from error


def check_links(folder: Path) -> None:
    """Refuse links to outside. The Hub's cache links from snapshots/ to blobs/ of the same model, which is inside.

    Hard links are not refused: copies made by ``cp -l`` and caches are full of them, they cannot lead out of what the
    user may read, and what was read is recorded by its sha256.
    """
    root = folder.resolve()
    if root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--"):
        root = root.parent.parent
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() and not path.resolve().is_relative_to(root):
            raise UnsafeCheckpoint(
                f"{path} is a link to {path.resolve()}, outside the checkpoint; expected files inside the folder: "
                "replace the link by a copy of the file"
            )


def _read_config(folder: Path) -> Mapping[str, Any]:
    if not (folder / "config.json").is_file():
        hint = "expected a Hugging Face model folder"
        if (folder / "adapter_config.json").is_file():
            hint = "it holds a PEFT adapter: merge it into its base model (merge_and_unload) and save that"
        raise InvalidCheckpoint(f"{folder} has no config.json; {hint}")
    if (folder / "adapter_config.json").is_file():
        # transformers would put it into the model, or not, depending on whether PEFT is installed.
        raise InvalidCheckpoint(
            f"{folder} holds a PEFT adapter beside its model: merge it (merge_and_unload) and save that, or remove "
            "adapter_config.json and export it as an adapter"
        )
    config = read_json(folder / "config.json")
    if not isinstance(config.get("model_type"), str):
        raise InvalidCheckpoint(
            f"{folder / 'config.json'} has model_type {config.get('model_type')!r}; "
            "expected the name of an architecture, such as 'llama'"
        )
    if config.get("quantization_config"):
        method = dict(config["quantization_config"]).get("quant_method", "unknown")
        raise UnsupportedArchitecture(
            f"{folder} holds weights quantized with {method!r}; expected float weights: export the original checkpoint"
        )
    return config


def _check_no_custom_code(folder: Path, config: Mapping[str, Any]) -> None:
    tokenizer_config = read_json(folder / "tokenizer_config.json", missing_ok=True)
    for name, document in (("config.json", config), ("tokenizer_config.json", tokenizer_config)):
        if document.get("auto_map"):
            raise UnsafeCheckpoint(
                f"{folder / name} has auto_map {json.dumps(document['auto_map'])}: it asks to run code that comes with "
                "the checkpoint, which is never done; use a checkpoint in transformers' own format, or, if "
                f"transformers itself knows {config['model_type']!r}, remove the auto_map key"
            )


def _check_weights(folder: Path) -> tuple[Path, ...]:
    """The weight files, each with a sound header and of the size that the header states."""
    index = folder / WEIGHTS_INDEX
    if (folder / WEIGHTS).exists():
        tensors_of(folder / WEIGHTS)
        return (folder / WEIGHTS,)
    if index.exists():
        return _check_shards(folder, read_json(index))
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise UnsafeCheckpoint(
            f"{folder / pickles[0]} is a pickle file, which can run any code when it is read; expected {WEIGHTS}: "
            "on a machine you can afford to lose, load the model with AutoModelForCausalLM.from_pretrained and save it "
            "with save_pretrained, which writes safetensors"
        )
    raise InvalidCheckpoint(f"{folder} has no weights; expected {WEIGHTS} or {WEIGHTS_INDEX} with its shards")


def _check_shards(folder: Path, index: Mapping[str, Any]) -> tuple[Path, ...]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InvalidCheckpoint(f"{folder / WEIGHTS_INDEX} has no weight_map; expected tensor names and their shards")
    tensors: dict[str, set[str]] = {}
    for name in sorted(set(map(str, weight_map.values()))):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UnsafeCheckpoint(
                f"{folder / WEIGHTS_INDEX} names the shard {name!r}; expected a .safetensors file in the same folder"
            )
        tensors[name] = tensors_of(folder / name)
    for tensor, name in weight_map.items():
        if tensor not in tensors[name]:
            raise InvalidCheckpoint(
                f"{folder / name} lacks {tensor}, which {WEIGHTS_INDEX} places there; download the checkpoint again"
            )
    return tuple(folder / name for name in tensors)


def tensors_of(path: Path) -> set[str]:
    """Names of the tensors in a safetensors file; raises InvalidCheckpoint if it is missing, cut short or damaged."""
    if not path.is_file():
        raise InvalidCheckpoint(f"{path} is missing, but {WEIGHTS_INDEX} names it; download the checkpoint again")
    header, header_bytes = _header_of(path)
    size_bytes = path.stat().st_size
    expected_bytes = 8 + header_bytes + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size_bytes != expected_bytes:
        raise InvalidCheckpoint(
            f"{path} has {size_bytes} bytes; its header promises {expected_bytes}: the file was cut short or changed, "
            "download it again"
        )
    return set(header)


def _header_of(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """The tensors' entries in a safetensors file, and the header's size in bytes; raises InvalidCheckpoint."""
    size_bytes = path.stat().st_size
    with path.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        if size_bytes < 8 or header_bytes > size_bytes - 8:
            raise InvalidCheckpoint(
                f"{path} has {size_bytes} bytes, fewer than its header alone; the file was cut short or is no "
                "safetensors file (perhaps a Git LFS pointer): download it again"
            )
        try:
            header = json.loads(stream.read(header_bytes))
            entries = {
                name: {
                    "shape": [int(size) for size in entry["shape"]],
                    "data_offsets": [int(offset) for offset in entry["data_offsets"]],
                }
                for name, entry in header.items()
                if name != "__metadata__"
            }
            if any(len(entry["data_offsets"]) != 2 for entry in entries.values()):
                raise ValueError("data_offsets are not two numbers")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InvalidCheckpoint(f"{path} has a damaged header ({error!r}); download it again") from error
    return entries, header_bytes


def read_json(path: Path, missing_ok: bool = False) -> Mapping[str, Any]:
    if missing_ok and not path.exists():
        return {}
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidCheckpoint(f"cannot read {path} as JSON ({error}); download the checkpoint again") from error
    if not isinstance(document, dict):
        raise InvalidCheckpoint(f"{path} holds a JSON {type(document).__name__}; expected an object")
    return document
