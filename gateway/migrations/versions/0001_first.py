"""The first schema."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Apply it; a downgrade is a restore of the backup."""
    op.create_table(
        "brakes",
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("scope", sa.String(), nullable=False),
        sa.Column("cause", sa.String(), nullable=False),
        sa.Column("since", sa.Float(), nullable=False),
        sa.Column("probe_at", sa.Float(), nullable=True),
        sa.Column("wait", sa.Float(), nullable=False),
        sa.Column("proof", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("kind", "scope", name=op.f("pk_brakes")),
    )
    op.create_table(
        "carrier_events",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("carrier_id", sa.String(), nullable=False),
        sa.Column("type", sa.String(), nullable=False),
        sa.Column("received_at", sa.Float(), nullable=False),
        sa.Column("to_number", sa.String(), nullable=False),
        sa.Column("from_number", sa.String(), nullable=False),
        sa.Column("connection_id", sa.String(), nullable=False),
        sa.Column("occurred_at", sa.Float(), nullable=False),
        sa.Column("report", sa.Text(), nullable=True),
        sa.Column("fax_id", sa.String(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_carrier_events")),
    )
    op.create_index("ix_carrier_events_age", "carrier_events", ["received_at"], unique=False)
    op.create_index(op.f("ix_carrier_events_carrier_id"), "carrier_events", ["carrier_id"], unique=False)
    op.create_index(
        "ix_carrier_events_parked",
        "carrier_events",
        ["to_number"],
        unique=False,
        sqlite_where=sa.text("fax_id IS NULL"),
        postgresql_where=sa.text("fax_id IS NULL"),
    )
    op.create_table(
        "carrier_ids",
        sa.Column("carrier_id", sa.String(), nullable=False),
        sa.Column("seen_at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("carrier_id", name=op.f("pk_carrier_ids")),
    )
    op.create_index(op.f("ix_carrier_ids_seen_at"), "carrier_ids", ["seen_at"], unique=False)
    op.create_table(
        "document_chunks",
        sa.Column("document_id", sa.String(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("stored_at", sa.Float(), nullable=False),
        sa.Column("data", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("document_id", "position", name=op.f("pk_document_chunks")),
    )
    op.create_index(
        "ix_document_chunks_first",
        "document_chunks",
        ["stored_at", "document_id"],
        unique=False,
        sqlite_where=sa.text("position = 0"),
        postgresql_where=sa.text("position = 0"),
    )
    op.create_table(
        "documents",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("sha256", sa.String(), nullable=False),
        sa.Column("pages", sa.Integer(), nullable=False),
        sa.Column("size", sa.Integer(), nullable=False),
        sa.Column("stored_at", sa.Float(), nullable=False),
        sa.Column("purged_at", sa.Float(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_documents")),
    )
    op.create_index(
        "ix_documents_kept",
        "documents",
        ["stored_at"],
        unique=False,
        sqlite_where=sa.text("purged_at IS NULL"),
        postgresql_where=sa.text("purged_at IS NULL"),
    )
    op.create_table(
        "duplicates",
        sa.Column("key", sa.String(), nullable=False),
        sa.Column("mail_id", sa.String(), nullable=False),
        sa.Column("fax_id", sa.String(), nullable=False),
        sa.Column("expires_at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("key", name=op.f("pk_duplicates")),
    )
    op.create_index(op.f("ix_duplicates_expires_at"), "duplicates", ["expires_at"], unique=False)
    op.create_index(op.f("ix_duplicates_fax_id"), "duplicates", ["fax_id"], unique=False)
    op.create_table(
        "turns",
        sa.Column("sender", sa.String(), nullable=False),
        sa.Column("turn", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("sender", name=op.f("pk_turns")),
    )
    op.create_table(
        "mails",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("sender", sa.String(), nullable=False),
        sa.Column("received_at", sa.Float(), nullable=False),
        sa.Column("message_id", sa.String(), nullable=True),
        sa.Column("thread", sa.Text(), nullable=False),
        sa.Column("subject", sa.Text(), nullable=False),
        sa.Column("original_headers", sa.LargeBinary(), nullable=False),
        sa.Column("document_id", sa.String(), nullable=True),
        sa.ForeignKeyConstraint(["document_id"], ["documents.id"], name=op.f("fk_mails_document_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_mails")),
    )
    op.create_index(op.f("ix_mails_document_id"), "mails", ["document_id"], unique=False)
    op.create_index(op.f("ix_mails_received_at"), "mails", ["received_at"], unique=False)
    op.create_table(
        "faxes",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("mail_id", sa.String(), nullable=False),
        sa.Column("number", sa.String(), nullable=False),
        sa.Column("recipient", sa.String(), nullable=False),
        sa.Column("pages", sa.Integer(), nullable=False),
        sa.Column("renews", sa.String(), nullable=True),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("due_at", sa.Float(), nullable=False),
        sa.Column("accepted_at", sa.Float(), nullable=False),
        sa.Column("give_up_at", sa.Float(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("held_for", sa.String(), nullable=True),
        sa.Column("held_detail", sa.String(), nullable=False),
        sa.Column("told_delayed", sa.Boolean(), nullable=False),
        sa.Column("cancel_asked", sa.Boolean(), nullable=False),
        sa.Column("ended_at", sa.Float(), nullable=True),
        sa.Column("reason", sa.String(), nullable=True),
        sa.Column("turn", sa.Float(), nullable=False),
        sa.Column("lease_until", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(["mail_id"], ["mails.id"], name=op.f("fk_faxes_mail_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_faxes")),
    )
    op.create_index(
        "ix_faxes_deadline",
        "faxes",
        ["state", "give_up_at"],
        unique=False,
        sqlite_where=sa.text("ended_at IS NULL"),
        postgresql_where=sa.text("ended_at IS NULL"),
    )
    op.create_index(
        "ix_faxes_due",
        "faxes",
        ["state", "due_at"],
        unique=False,
        sqlite_where=sa.text("ended_at IS NULL"),
        postgresql_where=sa.text("ended_at IS NULL"),
    )
    op.create_index(
        "ix_faxes_ended",
        "faxes",
        ["accepted_at"],
        unique=False,
        sqlite_where=sa.text("ended_at IS NOT NULL"),
        postgresql_where=sa.text("ended_at IS NOT NULL"),
    )
    op.create_index(op.f("ix_faxes_mail_id"), "faxes", ["mail_id"], unique=False)
    op.create_index(
        "ix_faxes_untold",
        "faxes",
        ["accepted_at"],
        unique=False,
        sqlite_where=sa.text("ended_at IS NULL AND NOT told_delayed"),
        postgresql_where=sa.text("ended_at IS NULL AND NOT told_delayed"),
    )
    op.create_index(
        "ix_faxes_waiting",
        "faxes",
        ["turn"],
        unique=False,
        sqlite_where=sa.text("state = 'queued'"),
        postgresql_where=sa.text("state = 'queued'"),
    )
    op.create_table(
        "attempts",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("fax_id", sa.String(), nullable=False),
        sa.Column("ordinal", sa.Integer(), nullable=False),
        sa.Column("number", sa.String(), nullable=False),
        sa.Column("started_at", sa.Float(), nullable=False),
        sa.Column("lease_until", sa.Float(), nullable=False),
        sa.Column("from_number", sa.String(), nullable=False),
        sa.Column("connection_id", sa.String(), nullable=False),
        sa.Column("quality", sa.String(), nullable=False),
        sa.Column("t38", sa.Boolean(), nullable=False),
        sa.Column("slot", sa.Integer(), nullable=True),
        sa.Column("carrier_id", sa.String(), nullable=True),
        sa.Column("taken_at", sa.Float(), nullable=True),
        sa.Column("stage", sa.Integer(), nullable=False),
        sa.Column("changed_at", sa.Float(), nullable=False),
        sa.Column("doubted_at", sa.Float(), nullable=True),
        sa.Column("reasonless_at", sa.Float(), nullable=True),
        sa.Column("cancel_wanted", sa.Boolean(), nullable=False),
        sa.Column("cancel_asked", sa.Boolean(), nullable=False),
        sa.Column("blocking", sa.Boolean(), nullable=False),
        sa.Column("open", sa.Boolean(), nullable=False),
        sa.Column("end", sa.String(), nullable=True),
        sa.Column("ended_at", sa.Float(), nullable=True),
        sa.Column("reason", sa.String(), nullable=True),
        sa.Column("internal_reason", sa.String(), nullable=True),
        sa.Column("pages", sa.Integer(), nullable=True),
        sa.Column("duration", sa.Integer(), nullable=True),
        sa.ForeignKeyConstraint(["fax_id"], ["faxes.id"], name=op.f("fk_attempts_fax_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_attempts")),
    )
    op.create_index(
        "ix_attempts_absent",
        "attempts",
        ["number"],
        unique=False,
        sqlite_where=sa.text("carrier_id IS NULL"),
        postgresql_where=sa.text("carrier_id IS NULL"),
    )
    op.create_index(
        "ix_attempts_newest",
        "attempts",
        ["started_at"],
        unique=False,
        sqlite_where=sa.text("carrier_id IS NOT NULL"),
        postgresql_where=sa.text("carrier_id IS NOT NULL"),
    )
    op.create_index(
        "uq_attempts_calling",
        "attempts",
        ["number"],
        unique=True,
        sqlite_where=sa.text("blocking"),
        postgresql_where=sa.text("blocking"),
    )
    op.create_index(
        "uq_attempts_carrier",
        "attempts",
        ["carrier_id"],
        unique=True,
        sqlite_where=sa.text("carrier_id IS NOT NULL"),
        postgresql_where=sa.text("carrier_id IS NOT NULL"),
    )
    op.create_index(
        "uq_attempts_channel",
        "attempts",
        ["slot"],
        unique=True,
        sqlite_where=sa.text("blocking"),
        postgresql_where=sa.text("blocking"),
    )
    op.create_index("uq_attempts_fax", "attempts", ["fax_id", "ordinal"], unique=True)
    op.create_table(
        "history",
        sa.Column("id", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("fax_id", sa.String(), nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.Column("event", sa.String(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["fax_id"], ["faxes.id"], name=op.f("fk_history_fax_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_history")),
    )
    op.create_index(op.f("ix_history_fax_id"), "history", ["fax_id"], unique=False)
    op.create_table(
        "outbox",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("fax_id", sa.String(), nullable=True),
        sa.Column("notice", sa.String(), nullable=True),
        sa.Column("cause", sa.String(), nullable=True),
        sa.Column("recipient", sa.String(), nullable=False),
        sa.Column("payload", sa.LargeBinary(), nullable=True),
        sa.Column("queued_at", sa.Float(), nullable=False),
        sa.Column("due_at", sa.Float(), nullable=False),
        sa.Column("lease_until", sa.Float(), nullable=False),
        sa.Column("fence", sa.Integer(), nullable=False),
        sa.Column("tries", sa.Integer(), nullable=False),
        sa.Column("sent_at", sa.Float(), nullable=True),
        sa.Column("given_up_at", sa.Float(), nullable=True),
        sa.Column("error", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(["fax_id"], ["faxes.id"], name=op.f("fk_outbox_fax_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_outbox")),
    )
    op.create_index(
        "ix_outbox_due",
        "outbox",
        ["due_at"],
        unique=False,
        sqlite_where=sa.text("sent_at IS NULL AND given_up_at IS NULL"),
        postgresql_where=sa.text("sent_at IS NULL AND given_up_at IS NULL"),
    )
    op.create_index(op.f("ix_outbox_fax_id"), "outbox", ["fax_id"], unique=False)
