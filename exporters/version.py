"""Writing a version folder: staged beside its final place, and renamed into it when it is complete.

.chat-1.staging.k3f9x2_a/  removed when its export fails; if it was killed, by the next export to the same place
  model.onnx  model.onnx.data
  model.json           facts and settings for the engine
  tokenizer.json  tokenizer_config.json  chat_template.jinja  generation_config.json
  certificate.json
  manifest.json        written last: a folder that has it is complete
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from exporters.checkpoint import Checkpoint
from exporters.config import CACHE_TYPES, DEFAULT_MAX_MODEL_LEN, ExportConfig
from exporters.decoder import DecoderShape
from exporters.errors import InvalidCheckpoint, InvalidConfig, OutputExists
from exporters.generation_config import file_name, generation_defaults, suppressed_tokens
from exporters.rope import constant_frequency_limit
from triton_backend.config import MODEL_JSON, LayerConfig, ModelConfig, VersionConfig
from triton_backend.errors import VersionFolderError
from triton_backend.version_folder import MANIFEST_JSON, read_manifest, sha256_of

GRAPH = "model.onnx"


@dataclass(frozen=True)
class Written:
    """What a version's certificate is told: sizes of the graph (or of each), the widest attention window, and what the
    checkpoint asks of ``generate`` that the engine does not do.
    """

    graph: Mapping[str, Any]
    sliding_window: int | None = None
    ignored_settings: Mapping[str, Any] = field(default_factory=dict)


@contextmanager
def staged(out: Path, overwrite: bool, marker: str = MODEL_JSON) -> Iterator[Path]:
    """A new folder beside ``out`` that takes its place if the body succeeds and is removed if it does not."""
    check_output(out, overwrite, marker)
    out.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(out)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.staging.", dir=out.parent))
    lock = _lock(staging)
    try:
        staging.chmod(0o755)  # Triton may run as another user
        yield staging
        check_output(out, overwrite, marker)
        if out.exists() and any(out.iterdir()):
            replaced = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
            out.rename(replaced)
            staging.rename(out)
            shutil.rmtree(replaced)
        else:
            staging.rename(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _remove_abandoned(out: Path) -> None:
    """Remove what exports to ``out`` left that were killed: nobody holds its lock any more."""
    staging = re.compile(rf"\.{re.escape(out.name)}\.staging\.\w+")
    for folder in out.parent.iterdir():
        if staging.fullmatch(folder.name) and (lock := _lock(folder)) is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """A descriptor that holds the folder's lock as long as it is open; None if somebody else's does, or none can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def check_output(out: Path, overwrite: bool, marker: str = MODEL_JSON) -> None:
    """Raise OutputExists unless ``out`` is free, empty, or may be replaced: sealed, and of the kind that has a file
    ``marker``.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise OutputExists(f"{out} exists and is not a folder; choose another output folder")
    if not any(out.iterdir()):
        return
    if not overwrite:
        raise OutputExists(f"{out} exists and is not empty; choose another output folder or pass --overwrite")
    if not _is_sealed(out, marker):
        raise OutputExists(
            f"{out} holds something else (expected {marker} and a readable {MANIFEST_JSON}), so it is not overwritten; "
            "choose another output folder"
        )


def _is_sealed(folder: Path, marker: str) -> bool:
    try:
        return marker in read_manifest(folder)["files"]
    except VersionFolderError:
        return False


def version_config(
    export: ExportConfig, checkpoint: Checkpoint, original: PreTrainedModel, shape: DecoderShape, num_top_logits: int
) -> VersionConfig:
    """model.json of the version; raises InvalidConfig if the asked lengths do not suit the model."""
    model_config: Any = original.config
    text_config = model_config.get_text_config(decoder=True)
    max_position_embeddings, limit = _limits(checkpoint, text_config)
    if export.max_model_len is not None and export.max_model_len > limit:
        raise InvalidConfig(
            f"max_model_len has value {export.max_model_len}; this model keeps its quality and its constant rotary "
            f"frequencies up to {limit} tokens: pass at most that"
        )
    eos = _special_token("eos_token_id", checkpoint, text_config)
    model = ModelConfig(
        architecture=str((model_config.architectures or [checkpoint.model_type])[0]),
        model_type=checkpoint.model_type,
        vocab_size=shape.vocab_size,
        max_position_embeddings=max_position_embeddings,
        layers=tuple(LayerConfig(layer.num_kv_heads, layer.head_size) for layer in shape.layers),
        num_top_logits=num_top_logits,
        eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (int(eos),),
        bos_token_id=_special_token("bos_token_id", checkpoint, text_config),
        pad_token_id=_special_token("pad_token_id", checkpoint, text_config),
        precision=export.precision,
        cache_type=CACHE_TYPES[export.precision, export.device],
        suppressed_token_ids=tuple(suppressed_tokens(original)),
        generation_defaults=generation_defaults(original.generation_config, checkpoint),
    )
    num_beams = model.generation_defaults.get("beam_width", 1)
    if num_beams > export.max_num_seqs:
        raise InvalidConfig(
            f"max_num_seqs has value {export.max_num_seqs}; the checkpoint's {file_name(checkpoint)} asks for "
            f"num_beams = {num_beams} by default, and every beam takes a row: expected at least {num_beams}"
        )
    return VersionConfig(model, export.engine_config(export.max_model_len or min(limit, DEFAULT_MAX_MODEL_LEN)))


def _special_token(name: str, checkpoint: Checkpoint, text_config: Any) -> Any:
    """generation_config.json decides; what it leaves out is taken from config.json."""
    given = checkpoint.generation_config.get(name)
    return getattr(text_config, name, None) if given is None else given


def _limits(checkpoint: Checkpoint, text_config: Any) -> tuple[int, int]:
    """(max_position_embeddings, longest sequence that can be exported), both in tokens."""
    positions = getattr(text_config, "max_position_embeddings", None)
    if positions is None and hasattr(text_config, "relative_attention_num_buckets"):
        positions = DEFAULT_MAX_MODEL_LEN  # only distances count, and beyond some they are all the same
    if not isinstance(positions, int) or positions < 2:
        raise InvalidCheckpoint(
            f"{checkpoint.folder / 'config.json'} has max_position_embeddings {positions!r}; "
            "expected the length in tokens that the model was trained for"
        )
    return positions, min(positions, constant_frequency_limit(text_config) or positions)


def write_tokenizer(folder: Path, tokenizer: Any, checkpoint: Checkpoint, vocab_size: int) -> None:
    """Write the tokenizer as transformers uses it, so that the engine gives a text the same ids."""
    if (largest := max(tokenizer.get_vocab().values(), default=0)) >= vocab_size:
        raise InvalidCheckpoint(
            f"the tokenizer of {checkpoint.folder} has token id {largest}, but the model's vocabulary ends at "
            f"{vocab_size - 1}; use the tokenizer that belongs to the model, or resize the model's token embeddings"
        )
    for name in ("is_local", "local_files_only"):  # how it was loaded, not what it is
        tokenizer.init_kwargs.pop(name, None)
    tokenizer.save_pretrained(folder)
    write_json(folder / "generation_config.json", checkpoint.generation_config)


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def source_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """The checkpoint's identity for the manifest: its name and the sha256 of its config and weights."""
    paths = (checkpoint.folder / "config.json", *checkpoint.files)
    return {"checkpoint": checkpoint.source, "files": {path.name: sha256_of(path) for path in paths}}


def environment() -> dict[str, str]:
    """Versions of what made this version."""
    found = {"python": platform.python_version(), "machine": platform.machine(), "cpu": _cpu_name()}
    for package in ("torch", "transformers", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "tokenizers"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
