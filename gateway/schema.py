"""The tables, once for every database.

In charge of: what is stored and which rules the database itself holds: one call per number and per
channel, one fax per carrier's id, one row per event, one mail per outbox key.

Promises: `metadata` equals what the migrations build (a test compares them). Times are seconds since
1970, UTC. No document content outside `document_chunks`, no mail content outside `mails.original_headers`
and `outbox.payload` (mail to the postmaster).

Fails: never; this module only describes.
"""

from sqlalchemy import (
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    text,
    true,
)

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    }
)

documents = Table(
    "documents",
    metadata,
    Column("id", String, primary_key=True),
    Column("sha256", String, nullable=False),
    Column("pages", Integer, nullable=False),
    Column("size", Integer, nullable=False),
    Column("stored_at", Float, nullable=False),
    Column("purged_at", Float),
)
Index("ix_documents_kept", documents.c.stored_at, sqlite_where=text("purged_at IS NULL"),
      postgresql_where=text("purged_at IS NULL"))  # fmt: skip

# No foreign key to `documents`: the chunks of a large one are written before the row that shows them.
document_chunks = Table(
    "document_chunks",
    metadata,
    Column("document_id", String, primary_key=True),
    Column("position", Integer, primary_key=True),
    Column("stored_at", Float, nullable=False),
    Column("data", LargeBinary, nullable=False),
)
Index("ix_document_chunks_first", document_chunks.c.stored_at, document_chunks.c.document_id,
      sqlite_where=text("position = 0"), postgresql_where=text("position = 0"))  # fmt: skip

mails = Table(
    "mails",
    metadata,
    Column("id", String, primary_key=True),
    Column("sender", String, nullable=False),
    Column("received_at", Float, nullable=False, index=True),
    Column("message_id", String),
    Column("thread", Text, nullable=False),  # References, for the reply
    Column("subject", Text, nullable=False),
    Column("original_headers", LargeBinary, nullable=False),
    Column("document_id", String, ForeignKey("documents.id"), index=True),
)

faxes = Table(
    "faxes",
    metadata,
    Column("id", String, primary_key=True),
    Column("mail_id", String, ForeignKey("mails.id"), nullable=False, index=True),
    Column("number", String, nullable=False),
    Column("recipient", String, nullable=False),
    Column("pages", Integer, nullable=False),
    Column("renews", String),
    Column("state", String, nullable=False),
    Column("due_at", Float, nullable=False),
    Column("accepted_at", Float, nullable=False),
    Column("give_up_at", Float, nullable=False),
    Column("version", Integer, nullable=False),
    Column("held_for", String),
    Column("held_detail", String, nullable=False),
    Column("told_delayed", Boolean, nullable=False),
    Column("cancel_asked", Boolean, nullable=False),
    Column("ended_at", Float),
    Column("reason", String),
    Column("turn", Float, nullable=False),  # the order of calls: senders take turns
    Column("lease_until", Float, nullable=False),  # who asks the carrier about it now
    Column("ripe", Boolean, nullable=False, server_default=true()),  # queued, and `due_at` has come
    Column("asks", Integer, nullable=False, server_default="0"),  # questions begun since one was finished
)
# The search for the next call must not walk past 100,000 faxes that wait for their time.
Index("ix_faxes_ripe", faxes.c.turn, faxes.c.number, sqlite_where=text("state = 'queued' AND ripe"),
      postgresql_where=text("state = 'queued' AND ripe"))  # fmt: skip
Index("ix_faxes_unripe", faxes.c.due_at, sqlite_where=text("state = 'queued' AND NOT ripe"),
      postgresql_where=text("state = 'queued' AND NOT ripe"))  # fmt: skip
Index("ix_faxes_due", faxes.c.state, faxes.c.due_at, sqlite_where=text("ended_at IS NULL"),
      postgresql_where=text("ended_at IS NULL"))  # fmt: skip
Index("ix_faxes_untold", faxes.c.accepted_at, sqlite_where=text("ended_at IS NULL AND NOT told_delayed"),
      postgresql_where=text("ended_at IS NULL AND NOT told_delayed"))  # fmt: skip
Index("ix_faxes_deadline", faxes.c.state, faxes.c.give_up_at, sqlite_where=text("ended_at IS NULL"),
      postgresql_where=text("ended_at IS NULL"))  # fmt: skip
Index("ix_faxes_ended", faxes.c.accepted_at, sqlite_where=text("ended_at IS NOT NULL"),
      postgresql_where=text("ended_at IS NOT NULL"))  # fmt: skip

attempts = Table(
    "attempts",
    metadata,
    Column("id", String, primary_key=True),
    Column("fax_id", String, ForeignKey("faxes.id"), nullable=False),
    Column("ordinal", Integer, nullable=False),
    Column("number", String, nullable=False),
    Column("started_at", Float, nullable=False),
    Column("lease_until", Float, nullable=False),
    Column("from_number", String, nullable=False),
    Column("connection_id", String, nullable=False),
    Column("quality", String, nullable=False),
    Column("t38", Boolean, nullable=False),
    Column("slot", Integer),
    Column("carrier_id", String),
    Column("taken_at", Float),
    Column("stage", Integer, nullable=False),
    Column("changed_at", Float, nullable=False),
    Column("doubted_at", Float),
    Column("reasonless_at", Float),
    Column("cancel_wanted", Boolean, nullable=False),
    Column("cancel_asked", Boolean, nullable=False),
    Column("blocking", Boolean, nullable=False),
    Column("open", Boolean, nullable=False),
    Column("end", String),
    Column("ended_at", Float),
    Column("reason", String),
    Column("internal_reason", String),
    Column("pages", Integer),
    Column("duration", Integer),
)
Index("uq_attempts_fax", attempts.c.fax_id, attempts.c.ordinal, unique=True)
Index("uq_attempts_carrier", attempts.c.carrier_id, unique=True, sqlite_where=text("carrier_id IS NOT NULL"),
      postgresql_where=text("carrier_id IS NOT NULL"))  # fmt: skip
# Rule 4: while a call to a number is open, nobody on any machine calls it; nor takes its channel.
Index("uq_attempts_calling", attempts.c.number, unique=True, sqlite_where=text("blocking"),
      postgresql_where=text("blocking"))  # fmt: skip
Index("uq_attempts_channel", attempts.c.slot, unique=True, sqlite_where=text("blocking"),
      postgresql_where=text("blocking"))  # fmt: skip
# A late sighting looks for the doubt that was closed as absent.
Index("ix_attempts_absent", attempts.c.number, sqlite_where=text("carrier_id IS NULL"),
      postgresql_where=text("carrier_id IS NULL"))  # fmt: skip
Index("ix_attempts_newest", attempts.c.from_number, attempts.c.started_at,
      sqlite_where=text("carrier_id IS NOT NULL"),
      postgresql_where=text("carrier_id IS NOT NULL"))  # fmt: skip

history = Table(
    "history",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("fax_id", String, ForeignKey("faxes.id"), nullable=False, index=True),
    Column("at", Float, nullable=False),
    Column("event", String, nullable=False),
    Column("state", String, nullable=False),  # after the event
    Column("detail", Text, nullable=False),  # JSON object
)

# Rule 5: answer and event both insert here first, so that neither can miss the other.
carrier_ids = Table(
    "carrier_ids",
    metadata,
    Column("carrier_id", String, primary_key=True),
    Column("seen_at", Float, nullable=False, index=True),
)

carrier_events = Table(
    "carrier_events",
    metadata,
    Column("id", String, primary_key=True),
    Column("carrier_id", String, nullable=False, index=True),
    Column("type", String, nullable=False),
    Column("received_at", Float, nullable=False),
    Column("to_number", String, nullable=False),
    Column("from_number", String, nullable=False),
    Column("connection_id", String, nullable=False),
    Column("occurred_at", Float, nullable=False),
    Column("report", Text),  # JSON object; NULL: says nothing about progress
    Column("fax_id", String),  # NULL: parked, its attempt is not known yet
)
Index("ix_carrier_events_parked", carrier_events.c.to_number, sqlite_where=text("fax_id IS NULL"),
      postgresql_where=text("fax_id IS NULL"))  # fmt: skip
Index("ix_carrier_events_age", carrier_events.c.received_at)

# Why nothing is called: an operator's `hold --all`, an account hold, a pause. Gone when it is over.
brakes = Table(
    "brakes",
    metadata,
    Column("kind", String, primary_key=True),  # operator, hold, pause
    Column("scope", String, primary_key=True),  # account, or the `from` number
    Column("cause", String, nullable=False),
    Column("since", Float, nullable=False),
    Column("probe_at", Float),  # NULL: only an operator ends it
    Column("wait", Float, nullable=False),  # seconds to the next probe after that one
    Column("proof", Integer, nullable=False),
)

outbox = Table(
    "outbox",
    metadata,
    Column("id", String, primary_key=True),
    Column("fax_id", String, ForeignKey("faxes.id"), index=True),
    Column("notice", String),
    Column("cause", String),
    Column("recipient", String, nullable=False),
    Column("payload", LargeBinary),
    Column("queued_at", Float, nullable=False),
    Column("due_at", Float, nullable=False),
    Column("lease_until", Float, nullable=False),
    Column("fence", Integer, nullable=False),
    Column("tries", Integer, nullable=False),
    Column("sent_at", Float),
    Column("given_up_at", Float),
    Column("error", String, nullable=False),
    Column("turn", Float, nullable=False, server_default="0"),  # the order of sending: recipients take turns
    Column("claims", Integer, nullable=False, server_default="0"),  # since somebody last came back from one
)
Index("ix_outbox_turn", outbox.c.turn, outbox.c.due_at, outbox.c.lease_until,
      sqlite_where=text("sent_at IS NULL AND given_up_at IS NULL"),
      postgresql_where=text("sent_at IS NULL AND given_up_at IS NULL"))  # fmt: skip
Index("ix_outbox_recipient", outbox.c.recipient, outbox.c.turn,
      sqlite_where=text("sent_at IS NULL AND given_up_at IS NULL"),
      postgresql_where=text("sent_at IS NULL AND given_up_at IS NULL"))  # fmt: skip

# Rule 6: the same mail twice is one fax.
duplicates = Table(
    "duplicates",
    metadata,
    Column("key", String, primary_key=True),
    Column("mail_id", String, nullable=False),
    Column("fax_id", String, nullable=False, index=True),
    Column("expires_at", Float, nullable=False, index=True),
)

# Start-time fair queueing: a sender's next fax gets the turn after its last, never one long past.
turns = Table(
    "turns",
    metadata,
    Column("sender", String, primary_key=True),  # "" is the turn that is being served
    Column("turn", Float, nullable=False),
)
