"""How every process of the control plane writes its log: one line per event on stderr, ``key=value``.

Events are constant names, data are fields; prompts, answers, keys and passwords are never logged. Lines of libraries
(gunicorn, Celery, SQLAlchemy) go through the same formatter.
"""

from __future__ import annotations

import logging
import sys

import structlog
from structlog.typing import Processor

KEY_ORDER = ("timestamp", "level", "process", "event")


def configure_logging(process: str) -> None:
    """Called once, by the entry point of a process; ``process`` is named in every line."""
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        lambda _logger, _method, fields: {"process": process, **fields},
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info,
            structlog.processors.LogfmtRenderer(key_order=KEY_ORDER, bool_as_flag=False),
        ],
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.INFO)
    # Alembic reports every plugin that it loads.
    logging.getLogger("alembic").setLevel(logging.WARNING)
