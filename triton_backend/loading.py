"""From a version folder to a warm engine: verify, read, load, run it once."""

from __future__ import annotations

import sys
from pathlib import Path

import structlog
import torch

from triton_backend import version_folder
from triton_backend.adapter_store import AdapterStore
from triton_backend.config import VersionConfig
from triton_backend.engine import Engine
from triton_backend.errors import VersionFolderError
from triton_backend.event_log import EventLog
from triton_backend.metrics import MetricSink
from triton_backend.model_runner import ModelRunner
from triton_backend.session import GRAPHS_ADVICE
from triton_backend.tokenizer import Tokenizer

log = structlog.get_logger()


def configure_logging() -> None:
    """JSON lines on standard error, which Triton passes on into its own log; standard output belongs to answers."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


def load_engine(
    folder: Path,
    metric_sink: MetricSink | None = None,
    is_sealed: bool = True,
    events: EventLog | None = None,
    is_started: bool = True,
) -> tuple[Engine, VersionConfig]:
    """Load ``folder`` and start its engine; raises VersionFolderError naming the file that is missing, changed or bad.

    ``is_sealed`` is False only while an exporter tests a folder that has no manifest yet; ``is_started`` only where
    steps are taken by hand.
    """
    # ONNX Runtime's and torch's spinning threads fight over the cores; sampling is small, so it gets one thread.
    torch.set_num_threads(1)
    digest = ""
    if is_sealed:
        version_folder.verify(folder)
        digest = version_folder.digest(folder)
    config = VersionConfig.read(folder)
    runner = ModelRunner(folder, config)
    adapters = AdapterStore(folder.parent / "adapters", digest)
    engine = Engine(config, runner, Tokenizer(folder), adapters, metric_sink, digest, events)
    try:
        engine.start() if is_started else runner.warm_up()
    except Exception as error:
        graphs = " or ".join(filter(None, (config.model.encoder_graph, config.model.graph)))
        advice = GRAPHS_ADVICE if config.engine.cuda_graphs else ""
        raise VersionFolderError(f"{graphs} of {folder} loads but does not run: {error}{advice}") from error
    log.info("engine_started", folder=str(folder), digest=digest[:12], max_model_len=config.engine.max_model_len)
    return engine, config
