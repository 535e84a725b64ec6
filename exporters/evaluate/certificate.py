"""Suite ``certificate``: what the version's own proof found when it was exported. Nothing is computed again.

    passed  whether every check of the certificate held, as its writer decided (``exporters.certificate`` for text
            models, ``exporters.encoder_certificate`` for encoders)

The other metrics are the numbers of the certificate's summary under their own names: ``agreement``, ``kl_mean``,
``max_logit_difference``, ``perplexity_ratio``, ``size_bytes``, … (defined in those modules and in
``exporters.comparison``). ``exporters.verify`` runs the proof again.
"""

from __future__ import annotations

import json
from typing import Any

from exporters.errors import InvalidVersion
from exporters.evaluate.report import Report, Task

CERTIFICATE_JSON = "certificate.json"


def read_certificate(task: Task) -> Report:
    """The recorded verdict and numbers; raises InvalidVersion if there are none."""
    path = task.folder / CERTIFICATE_JSON
    if not path.is_file():
        raise InvalidVersion(f"{task.folder} has no certificate; export it again without --no-certify")
    try:
        summary: Any = json.loads(path.read_text(encoding="utf-8"))["summary"]
        metrics = {name: value for name, value in summary.items() if isinstance(value, (bool, int, float))}
        failed = [str(name) for name in summary.get("failed", [])]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidVersion(f"{path} has no summary ({error!r}); export the version again") from error
    if not isinstance(metrics.get("passed"), bool):
        raise InvalidVersion(f"{path} says passed: {summary.get('passed')!r}; expected true or false: export it again")
    return Report(metrics, examples=tuple({"failed": name} for name in failed))
