"""Who made an API key."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("api_keys") as table:
        table.add_column(sa.Column("created_by", sa.String(length=128), nullable=False, server_default="system"))


def downgrade() -> None:
    with op.batch_alter_table("api_keys") as table:
        table.drop_column("created_by")
