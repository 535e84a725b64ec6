"""Table of API keys.

The secret itself is never stored, only its sha256: it has 256 random bits, so no salt is needed.
"""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import DateTime, String
from sqlalchemy.orm import Mapped, mapped_column

from control_plane.extensions import Base


def now() -> datetime:
    """The current time in UTC without a zone: SQLite keeps none, so every column of ours means UTC."""
    return datetime.now(UTC).replace(tzinfo=None)


class ApiKey(Base):
    """``llmos_<prefix>_<secret>``: the prefix is public and finds the row, the secret is compared by its hash."""

    __tablename__ = "api_keys"

    id: Mapped[int] = mapped_column(primary_key=True)
    prefix: Mapped[str] = mapped_column(String(16), unique=True)
    secret_sha256: Mapped[str] = mapped_column(String(64))
    name: Mapped[str] = mapped_column(String(100))
    role: Mapped[str] = mapped_column(String(16))
    expires_at: Mapped[datetime | None] = mapped_column(DateTime)
    revoked_at: Mapped[datetime | None] = mapped_column(DateTime)
    last_used_at: Mapped[datetime | None] = mapped_column(DateTime)
    created_at: Mapped[datetime] = mapped_column(DateTime, default=now)

    def is_valid(self, at: datetime) -> bool:
        return self.revoked_at is None and (self.expires_at is None or at < self.expires_at)
