"""The schema's history: each release's database becomes the next one's.

In charge of: bringing a database to this program's schema, and of refusing one from a newer program.

Promises: an upgrade happens whole or not at all; a database that is up to date is not touched, and Alembic
not even loaded.

Fails: `WrongRevision`, with what to do.
"""

from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.engine import Connection

REVISIONS = ("0001", "0002", "0003")
"""Every revision in `versions/`, oldest first; a test compares them."""


class WrongRevision(Exception):
    """The database is not at this program's revision; the text says what to do."""


class NotYet(WrongRevision):
    """A start of the daemon brings it there."""


def revision(connection: Connection) -> str | None:
    """Return the revision that the database is at, None for an empty one."""
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar()


def upgrade(connection: Connection) -> None:
    """Bring the database to the newest revision, inside the caller's transaction."""
    current = revision(connection)
    if current == REVISIONS[-1]:
        return
    _refuse_newer(current)
    from alembic import command, config  # noqa: PLC0415 -- slow to import, seldom needed

    settings = config.Config()
    settings.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    settings.attributes["connection"] = connection
    command.upgrade(settings, "head")


def require_current(connection: Connection) -> None:
    """Raise WrongRevision unless the database is at the newest revision, NotYet if a start brings it there.

    To be called inside a transaction.
    """
    current = revision(connection)
    _refuse_newer(current)
    if current is None:
        raise NotYet("the database has no tables yet: start `fax-gateway serve` once, it makes them")
    if current != REVISIONS[-1]:
        raise NotYet(
            "the database is older than this program: start `fax-gateway serve` once, it upgrades it"
        )


def _refuse_newer(current: str | None) -> None:
    if current is not None and current not in REVISIONS:
        raise WrongRevision(
            f"the database was written by a newer fax-gateway (revision {current}): upgrade the program"
        )
