"""What the health endpoints and the report of the system answer."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from control_plane.operations import Out


class Live(Out):
    status: Literal["live"]


class ModelReadiness(Out):
    """``state`` is ready, loading or failed; ``reason`` says why in one word, ``message`` in a sentence, null for those
    who may not read.
    """

    version: int
    state: str
    latency_ms: float | None
    reason: str | None
    message: str | None


class QueueReadiness(Out):
    """Whether a worker answered when it was last asked through its queue, and how long ago one last did."""

    is_answered: bool
    answered_s_ago: float | None


class Readiness(Out):
    """``reason`` is there if no model is installed."""

    status: Literal["ready", "not_ready"]
    models: dict[str, ModelReadiness]
    queues: dict[str, QueueReadiness]
    reason: str = ""


class ProcessOut(Out):
    """``state`` is supervisord's word, such as RUNNING or BACKOFF."""

    name: str
    state: str
    pid: int | None
    uptime_s: float | None


class Answer(Out):
    """What one part of the installation said; ``error`` is there if it did not, and the rest then empty."""

    error: str | None


class SupervisorOut(Answer):
    processes: list[ProcessOut] = Field(default_factory=list)


class WorkerOut(Out):
    name: str
    queues: list[str] = Field(description="the queues whose jobs it runs")


class WorkersOut(Answer):
    workers: list[WorkerOut] = Field(default_factory=list)


class LoadedModelOut(Out):
    """A version as Triton sees it: READY, LOADING, UNLOADING, UNAVAILABLE, or empty if it was never loaded."""

    name: str
    version: str
    state: str
    reason: str | None


class TritonOut(Answer):
    version: str | None = None
    models: list[LoadedModelOut] = Field(default_factory=list)


class DatabaseOut(Answer):
    kind: str | None = None
    version: str | None = None


class RedisOut(Answer):
    version: str | None = None
    memory_bytes: int | None = None


class DiskOut(Out):
    name: str
    path: str
    total_bytes: int
    free_bytes: int


class MemoryOut(Out):
    total_bytes: int
    available_bytes: int
    num_cpus: int


class SystemOut(Out):
    versions: dict[str, str] = Field(description="of Python and the packages that matter here")
    supervisor: SupervisorOut
    workers: WorkersOut
    triton: TritonOut
    database: DatabaseOut
    redis: RedisOut
    disks: list[DiskOut]
    memory: MemoryOut
