"""What kinds of jobs there are: a kind is a schema of parameters and named steps. The table itself is
``control_plane.job_kinds``; here is only its shape, because the domains that define kinds stand above this one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict

from control_plane.settings import Settings
from control_plane.subprocesses import ChildEvent


class JobParams(BaseModel):
    """Base of every kind's parameters; a name that a kind does not have is refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @property
    def scope(self) -> str:
        """What a key must have to submit a job with these parameters."""
        return "jobs"

    @property
    def needs_gpu(self) -> bool:
        """Whether only a worker beside a GPU can run it: its queue is then ``gpu``."""
        return False


class JobRun(Protocol):
    """What a step is given.

    ``results`` holds what the finished steps returned; ``folder`` is the job's own; ``actor`` is who submitted it.
    """

    job_id: str
    params: Any
    results: Mapping[str, Mapping[str, Any]]
    folder: Path
    settings: Settings
    actor: str

    def child(
        self,
        module: str,
        *arguments: str,
        good_statuses: Sequence[int] = (0,),
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> ChildEvent | None:
        """Run ``python -m module arguments`` and record its events; returns its ``finished`` event.

        ``environment`` is added to the worker's: the place for secrets, which everybody could read on a command line.
        Raises ChildFailed, or, if the job was cancelled or given to another worker, what ends the run.
        """

    def pause(self, seconds: float) -> None:
        """Wait for something that is done elsewhere; raises what ends the run, if something does."""


Step = Callable[[JobRun], Mapping[str, Any] | None]


@dataclass(frozen=True)
class JobKind:
    """``role`` may submit it; ``queue`` says who runs it, unless it needs a GPU: default (light) or cpu.

    Steps run in order. A step returns a small JSON object that later steps find in ``results``, and is not run again
    once it has; killed in the middle, it runs again, so it first asks how much of its work is already there.
    """

    purpose: str
    params: type[JobParams]
    steps: Mapping[str, Step]
    queue: str = "default"
    role: str = "operator"
