"""The newest call of each number that faxes are sent from: a new number has none among a million."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Apply it; a downgrade is a restore of the backup."""
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
