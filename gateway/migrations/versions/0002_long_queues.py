"""Long queues: ripe faxes apart from waiting ones, turns for mails; questions that nobody came back from."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Apply it; a downgrade is a restore of the backup."""
    op.add_column("faxes", sa.Column("ripe", sa.Boolean(), server_default=sa.true(), nullable=False))
    op.add_column("faxes", sa.Column("asks", sa.Integer(), server_default="0", nullable=False))
    op.drop_index("ix_faxes_waiting", "faxes")
    op.create_index(
        "ix_faxes_ripe",
        "faxes",
        ["turn", "number"],
        unique=False,
        sqlite_where=sa.text("state = 'queued' AND ripe"),
        postgresql_where=sa.text("state = 'queued' AND ripe"),
    )
    op.create_index(
        "ix_faxes_unripe",
        "faxes",
        ["due_at"],
        unique=False,
        sqlite_where=sa.text("state = 'queued' AND NOT ripe"),
        postgresql_where=sa.text("state = 'queued' AND NOT ripe"),
    )
    op.add_column("outbox", sa.Column("turn", sa.Float(), server_default="0", nullable=False))
    op.drop_index("ix_outbox_due", "outbox")
    pending = sa.text("sent_at IS NULL AND given_up_at IS NULL")
    op.create_index(
        "ix_outbox_turn",
        "outbox",
        ["turn", "due_at", "lease_until"],
        unique=False,
        sqlite_where=pending,
        postgresql_where=pending,
    )
    op.create_index(
        "ix_outbox_recipient",
        "outbox",
        ["recipient", "turn"],
        unique=False,
        sqlite_where=pending,
        postgresql_where=pending,
    )
