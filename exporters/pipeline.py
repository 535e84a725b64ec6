"""One export from start to end: the steps, in order, and nothing else."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from exporters.certificate import certify
from exporters.checkpoint import Checkpoint, open_checkpoint
from exporters.config import ExportConfig, ExportedVersion
from exporters.decoder import MAX_TOP_LOGITS, DecoderShape, measure, trace
from exporters.events import EmitEvent, Progress
from exporters.fusions import fuse
from exporters.graph import graph_size, save_graph
from exporters.original import load_config, load_model, load_tokenizer
from exporters.version import (
    check_output,
    environment,
    source_of,
    staged,
    version_config,
    write_json,
    write_tokenizer,
)
from triton_backend.version_folder import digest, seal

STEPS = ("check", "load", "trace", "fuse", "save", "certify", "seal")
GRAPH = "model.onnx"


def run(config: ExportConfig, emit: EmitEvent, *, with_certificate: bool) -> ExportedVersion:
    """Export ``config.checkpoint`` to ``config.out``; raises ExportError and then leaves nothing behind."""
    progress = Progress(emit, STEPS)
    emit({"event": "started", "checkpoint": config.checkpoint, "out": str(config.out)})

    progress.step("check")
    out = config.out.absolute()
    check_output(out, config.overwrite)
    checkpoint = open_checkpoint(config.checkpoint)
    load_config(checkpoint)

    certificate: dict[str, Any] = {}
    with staged(out, config.overwrite) as folder:
        shape, sizes = _write_model(config, checkpoint, folder, progress)
        progress.step("certify")
        if with_certificate:
            certificate = certify(folder, checkpoint, shape.sliding_window, progress)
            certificate["graph"] = sizes
            write_json(folder / "certificate.json", certificate)
        progress.step("seal")
        seal(folder, source_of(checkpoint), environment())

    version = ExportedVersion(
        folder=out,
        digest=digest(out),
        size_bytes=sum(path.stat().st_size for path in out.iterdir()),
        passed=certificate.get("passed"),
        certificate=certificate,
    )
    emit(
        {
            "event": "finished",
            "folder": str(version.folder),
            "digest": version.digest,
            "size_bytes": version.size_bytes,
            "passed": version.passed,
            "graph": sizes,
            "certificate": certificate.get("summary", {}),
        }
    )
    return version


def _write_model(
    config: ExportConfig, checkpoint: Checkpoint, folder: Path, progress: Progress
) -> tuple[DecoderShape, dict[str, Any]]:
    """Everything of the version but its certificate and seal. The model is released on return.

    Returns the decoder's shape and the sizes of the graph as it was traced and as it was written.
    """
    progress.step("load")
    model = load_model(checkpoint)
    tokenizer = load_tokenizer(checkpoint)

    progress.step("trace")
    shape = measure(model)
    num_top_logits = min(MAX_TOP_LOGITS, shape.vocab_size)
    settings = version_config(config, checkpoint, model.config, shape, num_top_logits)
    program = trace(model, shape.layers, num_top_logits)

    progress.step("fuse")
    traced = graph_size(program.model)
    fuse(program.model, settings.engine.max_model_len)
    sizes = {"traced": asdict(traced), "fused": asdict(graph_size(program.model))}

    progress.step("save")
    save_graph(program, folder / GRAPH)
    settings.write(folder)
    write_tokenizer(folder, tokenizer, checkpoint, shape.vocab_size)
    return shape, sizes
