"""Models, versions, aliases, evaluations, and the history of what was served.

Model ──< Version      immutable: a digest in the artifact store, and what its certificate says of it
      ──< Alias        production, canary, …: each points to one version
      ──< Deployment   every change of what is served: who, when, why, and what became of it
Version ──< Evaluation what was measured of it
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import JSON, BigInteger, DateTime, ForeignKey, Index, String, Text, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column, relationship

from control_plane.extensions import Base, now

PRODUCTION, CANARY = "production", "canary"

IN_PROGRESS, UP_TO_DATE, BLOCKED, SUPERSEDED = "InProgress", "UpToDate", "BlockedByFailedLoad", "Superseded"
"""States of a deployment, in KServe's words; Superseded: another deployment came before it was done."""


class Model(Base):
    """``thresholds`` are what a version must reach to be promoted: {"suite.metric": {"min" or "max": number}}.

    ``revision`` counts edits of description and thresholds: its ETag.
    """

    __tablename__ = "models"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(64), unique=True)
    description: Mapped[str] = mapped_column(Text, default="")
    thresholds: Mapped[dict[str, dict[str, float]]] = mapped_column(JSON, default=dict)
    revision: Mapped[int] = mapped_column(default=1)
    created_by: Mapped[str] = mapped_column(String(128))
    created_at: Mapped[datetime] = mapped_column(DateTime, default=now)


class Version(Base):
    """``passed`` is the certificate's verdict, None without one; ``certificate`` is its summary.

    ``source`` says which checkpoint it was made from: its name and the sha256 of its files. ``warm_until``: it stays
    loaded till then although no alias points to it. A retired version is never served again.
    """

    __tablename__ = "versions"

    id: Mapped[int] = mapped_column(primary_key=True)
    model_id: Mapped[int] = mapped_column(ForeignKey("models.id", ondelete="CASCADE"))
    number: Mapped[int] = mapped_column()
    digest: Mapped[str] = mapped_column(String(64), index=True)
    architecture: Mapped[str | None] = mapped_column(String(100))
    precision: Mapped[str | None] = mapped_column(String(16))
    size_bytes: Mapped[int | None] = mapped_column(BigInteger)
    passed: Mapped[bool | None] = mapped_column()
    certificate: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)
    source: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)
    job_id: Mapped[str | None] = mapped_column(String(32))
    created_by: Mapped[str] = mapped_column(String(128))
    created_at: Mapped[datetime] = mapped_column(DateTime, default=now)
    warm_until: Mapped[datetime | None] = mapped_column(DateTime)
    retired_at: Mapped[datetime | None] = mapped_column(DateTime)

    model: Mapped[Model] = relationship()

    __table_args__ = (UniqueConstraint("model_id", "number"),)


class Alias(Base):
    """``weight``, of the canary only, is the percentage of requests that it gets. ``revision`` counts changes."""

    __tablename__ = "aliases"

    id: Mapped[int] = mapped_column(primary_key=True)
    model_id: Mapped[int] = mapped_column(ForeignKey("models.id", ondelete="CASCADE"))
    name: Mapped[str] = mapped_column(String(64))
    version_id: Mapped[int] = mapped_column(ForeignKey("versions.id"))
    weight: Mapped[float | None] = mapped_column()
    revision: Mapped[int] = mapped_column(default=1)
    updated_at: Mapped[datetime] = mapped_column(DateTime, default=now)

    model: Mapped[Model] = relationship()
    version: Mapped[Version] = relationship()

    __table_args__ = (UniqueConstraint("model_id", "name"),)


class Deployment(Base):
    """One change of what is served. ``kind`` is promote, rollback, canary, abort or withdraw.

    ``alias`` is what it moves; ``previous_version`` where that pointed before. ``overridden`` lists what the gate found
    when somebody forced it, for a ``reason``; ``job_id`` is the job that made it. ``failure_reason`` and
    ``failure_message`` say why it is blocked.
    """

    __tablename__ = "deployments"

    id: Mapped[int] = mapped_column(primary_key=True)
    model_id: Mapped[int] = mapped_column(ForeignKey("models.id", ondelete="CASCADE"))
    kind: Mapped[str] = mapped_column(String(16))
    alias: Mapped[str] = mapped_column(String(64))
    version_id: Mapped[int] = mapped_column(ForeignKey("versions.id"))
    previous_version_id: Mapped[int | None] = mapped_column(ForeignKey("versions.id"))
    weight: Mapped[float | None] = mapped_column()
    overridden: Mapped[list[str]] = mapped_column(JSON, default=list)
    reason: Mapped[str | None] = mapped_column(Text)
    job_id: Mapped[str | None] = mapped_column(String(32), unique=True)
    state: Mapped[str] = mapped_column(String(32), default=IN_PROGRESS, index=True)
    failure_reason: Mapped[str | None] = mapped_column(String(64))
    failure_message: Mapped[str | None] = mapped_column(Text)
    created_by: Mapped[str] = mapped_column(String(128))
    created_at: Mapped[datetime] = mapped_column(DateTime, default=now)
    finished_at: Mapped[datetime | None] = mapped_column(DateTime)

    model: Mapped[Model] = relationship()
    version: Mapped[Version] = relationship(foreign_keys=version_id)
    previous_version: Mapped[Version | None] = relationship(foreign_keys=previous_version_id)

    __table_args__ = (Index("ix_deployments_model_id", "model_id", "id"),)


class Evaluation(Base):
    """What one run of a suite measured of a version: ``metrics`` by name."""

    __tablename__ = "evaluations"

    id: Mapped[int] = mapped_column(primary_key=True)
    version_id: Mapped[int] = mapped_column(ForeignKey("versions.id", ondelete="CASCADE"), index=True)
    suite: Mapped[str] = mapped_column(String(100))
    metrics: Mapped[dict[str, float]] = mapped_column(JSON)
    data: Mapped[str | None] = mapped_column(Text)
    job_id: Mapped[str | None] = mapped_column(String(32))
    created_by: Mapped[str] = mapped_column(String(128))
    created_at: Mapped[datetime] = mapped_column(DateTime, default=now)

    version: Mapped[Version] = relationship()

    __table_args__ = (UniqueConstraint("job_id", "suite"),)
