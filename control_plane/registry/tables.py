"""Models and their versions.

A version is immutable: a digest in the artifact store, and what its certificate says of it.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import JSON, BigInteger, DateTime, ForeignKey, String, Text, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column, relationship

from control_plane.extensions import Base, now


class Model(Base):
    """``revision`` counts edits of the description: its ETag."""

    __tablename__ = "models"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(64), unique=True)
    description: Mapped[str] = mapped_column(Text, default="")
    revision: Mapped[int] = mapped_column(default=1)
    created_by: Mapped[str] = mapped_column(String(128))
    created_at: Mapped[datetime] = mapped_column(DateTime, default=now)


class Version(Base):
    """``passed`` is the certificate's verdict, None without one; ``certificate`` is its summary.

    ``source`` says which checkpoint it was made from: its name and the sha256 of its files.
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

    model: Mapped[Model] = relationship()

    __table_args__ = (UniqueConstraint("model_id", "number"),)
