"""One export from start to end: the steps, in order, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from exporters.certificate import certify
from exporters.checkpoint import Checkpoint, open_checkpoint
from exporters.config import ExportConfig, ExportedVersion
from exporters.decoder_version import write_decoder
from exporters.encoder import is_encoder
from exporters.encoder_version import write_encoder
from exporters.errors import InvalidConfig
from exporters.events import EmitEvent, Event, Progress
from exporters.original import kind_of, read_config
from exporters.seq2seq_version import write_seq2seq
from exporters.version import Written, check_output, environment, source_of, staged, write_json
from triton_backend.version_folder import digest, seal

STEPS = ("check", "load", "trace", "fuse", "save", "certify", "seal")
WRITERS: dict[str, Callable[[ExportConfig, Checkpoint, Path, Callable[[str], None]], Written]] = {
    "decoder": write_decoder,
    "encoder_decoder": write_seq2seq,
    "encoder": write_encoder,
}


def run(config: ExportConfig, emit: EmitEvent, *, with_certificate: bool) -> ExportedVersion:
    """Export ``config.checkpoint`` to ``config.out``; raises ExportError and then leaves nothing behind."""
    progress = Progress(emit, STEPS)
    emit({"event": "started", "checkpoint": config.checkpoint, "out": str(config.out), "name": config.name})

    progress.step("check")
    out = config.out.absolute()
    check_output(out, config.overwrite)
    checkpoint = open_checkpoint(config.checkpoint)
    kind = "encoder" if is_encoder(checkpoint) else kind_of(read_config(checkpoint))
    _check_asked(config, kind)
    if with_certificate and config.device == "cuda" and not torch.cuda.is_available():
        raise InvalidConfig(
            "device has value 'cuda', but PyTorch finds no CUDA device here to prove the version on; export with "
            "--no-certify and prove it with llmos verify where it will run"
        )

    certificate: dict[str, Any] = {}
    with staged(out, config.overwrite) as folder:
        written = WRITERS[kind](config, checkpoint, folder, progress.step)
        if written.ignored_settings:
            emit(_warning(written.ignored_settings))
        progress.step("certify")
        if with_certificate:
            certificate = certify(folder, checkpoint, written.sliding_window, progress, config.limits, config.eval_text)
            certificate["graph"] = written.graph
            certificate["ignored_generation_settings"] = written.ignored_settings
            write_json(folder / "certificate.json", certificate)
        progress.step("seal")
        seal(folder, {**source_of(checkpoint), "name": config.name}, environment())

    version = ExportedVersion(
        folder=out,
        digest=digest(out),
        size_bytes=sum(path.stat().st_size for path in out.iterdir()),
        passed=certificate.get("passed"),
        certificate=certificate,
        sizes=written.graph,
        timings=progress.timings(),
    )
    emit(
        {
            "event": "finished",
            "folder": str(version.folder),
            "digest": version.digest,
            "size_bytes": version.size_bytes,
            "passed": version.passed,
            "graph": version.sizes,
            "timings": {name: asdict(usage) for name, usage in version.timings.items()},
            "certificate": certificate.get("summary", {}),
            "checks": certificate.get("checks", []),
        }
    )
    return version


def _warning(ignored: Mapping[str, Any]) -> Event:
    message = f"the checkpoint asks generate for {', '.join(ignored)}, which the engine does not do by itself"
    message += "; requests may ask for what it can do, such as min_tokens"
    return {"event": "warning", "code": "IGNORED_SETTINGS", "message": message, "settings": ignored}


def _check_asked(config: ExportConfig, kind: str) -> None:
    """Refuse what was asked of a kind of model that cannot have it."""
    if config.lora_slots and kind != "decoder":
        raise InvalidConfig(f"lora_slots has value {config.lora_slots}, but this is an {kind}; expected a decoder")
    if config.calibration is not None and kind != "decoder":
        raise InvalidConfig(f"calibration is given, but this is an {kind}; expected a decoder")
    if config.precision == "bf16" and kind != "decoder":  # MultiHeadAttention has no kernel for it
        raise InvalidConfig(f"precision has value 'bf16', in which an {kind} cannot be proven; expected fp16")
    if config.max_source_len is not None and kind != "encoder_decoder":
        raise InvalidConfig(
            f"max_source_len has value {config.max_source_len}, but this {kind} reads no source; expected an "
            "encoder-decoder: pass max_model_len"
        )
