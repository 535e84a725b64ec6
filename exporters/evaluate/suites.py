"""The suites: what can be asked of a version, what each needs, and what all of them report.

Every metric has one definition, in the docstring of the suite that computes it. A metric is a number, or true or false,
under a name that keeps its meaning; counts and settings stand beside the metrics, not among them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from exporters.artifact import check_version
from exporters.errors import InvalidConfig, InvalidVersion
from exporters.evaluate.certificate import read_certificate
from exporters.evaluate.data_file import DataFile
from exporters.evaluate.exact_match import exact_match
from exporters.evaluate.perplexity import perplexity
from exporters.evaluate.report import Evaluation, Report, Task
from exporters.events import EmitEvent
from triton_backend.config import VersionConfig
from triton_backend.errors import VersionFolderError
from triton_backend.version_folder import digest


@dataclass(frozen=True)
class Suite:
    """``kinds`` are the kinds of models that it can evaluate; ``options`` the settings that mean something to it."""

    meaning: str
    run: Callable[[Task], Report]
    kinds: tuple[str, ...]
    options: tuple[str, ...] = ()

    @property
    def needs_data(self) -> bool:
        return "data" in self.options


SUITES: dict[str, Suite] = {
    "perplexity": Suite(
        "how well the version predicts a text", perplexity, ("decoder",), ("data", "limit", "window", "stride")
    ),
    "exact-match": Suite(
        "how many answers are the expected ones",
        exact_match,
        ("decoder", "encoder_decoder"),
        ("data", "limit", "stop"),
    ),
    "certificate": Suite(
        "what the version's own proof found", read_certificate, ("decoder", "encoder_decoder", "encoder")
    ),
}


@dataclass(frozen=True)
class EvaluateConfig:
    """One evaluation, checked when built.

    folder   the version folder
    suite    a name of SUITES
    data     the file to read: plain text or JSON lines
    limit    read no more than this: tokens (perplexity) or pairs (exact-match); None reads everything
    window   perplexity: most tokens that are read at once; None: what the version's context holds
    stride   perplexity: tokens that each window scores anew; None: half a window
    stop     exact-match: texts that end an answer
    """

    folder: Path
    suite: str
    data: Path | None = None
    limit: int | None = None
    window: int | None = None
    stride: int | None = None
    stop: tuple[str, ...] = field(default_factory=tuple)

    def __post_init__(self) -> None:
        if self.suite not in SUITES:
            raise InvalidConfig(f"suite has value {self.suite!r}; expected one of {', '.join(SUITES)}")
        suite = SUITES[self.suite]
        for name in ("data", "limit", "window", "stride", "stop"):
            if getattr(self, name) not in (None, ()) and name not in suite.options:
                takes = ", ".join(f"--{option}" for option in suite.options) or "no options"
                raise InvalidConfig(f"--{name} means nothing to {self.suite}, which takes {takes}; leave it out")
        if suite.needs_data and self.data is None:
            raise InvalidConfig(f"{self.suite} needs something to read; pass --data FILE")
        for name, least in (("limit", 1), ("window", 2), ("stride", 1)):
            if (value := getattr(self, name)) is not None and value < least:
                raise InvalidConfig(f"{name} has value {value}; expected a whole number ≥ {least}")
        if "" in self.stop:
            raise InvalidConfig("stop has value ''; expected a text that is not empty")


def evaluate(config: EvaluateConfig, emit: EmitEvent = lambda event: None) -> Evaluation:
    """Evaluate a version; raises ExportError. ``emit`` receives the events, the last of which is ``finished``."""
    folder, suite = config.folder, SUITES[config.suite]
    data = DataFile(config.data) if config.data is not None else None
    emit({"event": "started", "suite": config.suite, "folder": str(folder), "data": str(config.data or "") or None})
    emit({"event": "step", "step": "check", "done": 0, "total": 2})
    check_version(folder)
    try:
        version = VersionConfig.read(folder)
    except VersionFolderError as error:
        raise InvalidVersion(error.args[0]) from error
    if version.model.kind not in suite.kinds:
        able = [name for name, other in SUITES.items() if version.model.kind in other.kinds]
        raise InvalidConfig(
            f"{config.suite} evaluates versions of kind {' or '.join(suite.kinds)}, but {folder} is of kind "
            f"{version.model.kind}; suites for it: {', '.join(able)}"
        )
    emit({"event": "step", "step": "evaluate", "done": 1, "total": 2})
    settings: Mapping[str, Any] = {name: getattr(config, name) for name in suite.options if name != "data"}
    report = suite.run(Task(folder, version, data, settings, emit))
    evaluation = Evaluation(
        suite=config.suite,
        folder=folder,
        digest=digest(folder),
        data=data.identity() if data else None,
        **vars(report),
    )
    emit({"event": "finished", **asdict(evaluation), "folder": str(folder)})
    return evaluation
