"""Mails that nobody came back from; the newest call of each number that faxes are sent from."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Apply it; a downgrade is a restore of the backup."""
    op.add_column("outbox", sa.Column("claims", sa.Integer(), server_default="0", nullable=False))
    known = sa.text("carrier_id IS NOT NULL")
    op.drop_index("ix_attempts_newest", "attempts")
    op.create_index(
        "ix_attempts_newest",
        "attempts",
        ["from_number", "started_at"],
        unique=False,
        sqlite_where=known,
        postgresql_where=known,
    )
