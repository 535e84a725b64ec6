"""What a key may do: scopes, models, rates."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

COLUMNS = ("scopes", "models", "requests_per_minute", "tokens_per_minute")


def upgrade() -> None:
    with op.batch_alter_table("api_keys") as table:
        table.add_column(sa.Column("scopes", sa.JSON(), nullable=True))
        table.add_column(sa.Column("models", sa.JSON(), nullable=True))
        table.add_column(sa.Column("requests_per_minute", sa.Integer(), nullable=True))
        table.add_column(sa.Column("tokens_per_minute", sa.Integer(), nullable=True))


def downgrade() -> None:
    with op.batch_alter_table("api_keys") as table:
        for name in COLUMNS:
            table.drop_column(name)
