"""One unit of work, as the store's verbs see it.

In charge of: the connection with its time, the news that a unit leaves behind, the turns that several
gateways take, who is claimed apart from others, and the one statement that the databases spell apart.

Promises: one time for all that a unit does.

Fails: like the database.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import takewhile
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection

from gateway.records import Alert, Brake, Effect, Event, Fax, Rules


@dataclass(frozen=True, slots=True)
class Change:
    """What one event did, for the log and the metrics."""

    before: Fax
    after: Fax
    event: Event
    effects: tuple[Effect, ...]


@dataclass(slots=True)
class Unit:
    """One unit of work: a connection inside a transaction, its time, and what it changed."""

    connection: Connection
    now: float
    rules: Rules
    postmaster: str
    news: list["News"] = field(default_factory=list)  # in the order of their happening

    @property
    def changes(self) -> list[Change]:
        """The faxes that changed."""
        return [item for item in self.news if isinstance(item, Change)]


class Turn(IntEnum):
    """What is done by one gateway at a time; the numbers name advisory locks of PostgreSQL."""

    CALL = 1  # choosing the next call: brakes, channels and numbers are looked at as a whole
    TIME = 2  # letting time pass over many faxes
    PAPER = 3  # throwing documents away, and using one again
    REFUSAL = 4  # counting refusals that may concern the account


def take_turn(unit: Unit, turn: Turn) -> None:
    """Wait until no other gateway does the same; it lasts until the commit. SQLite has one writer anyway."""
    if unit.connection.dialect.name == "postgresql":
        unit.connection.execute(_TAKE_TURN, {"of": _TURNS_OF_THE_STORE, "turn": turn.value})


_TURNS_OF_THE_STORE = 0x666178  # the class of its advisory locks, for other programs keep off
_TAKE_TURN = sa.select(sa.func.pg_advisory_xact_lock(sa.bindparam("of"), sa.bindparam("turn")))


def suspects_apart(rows: Sequence[Any], suspect: Callable[[Any], bool]) -> Sequence[Any]:
    """Return the first row alone if the gateway may have fallen over it, else those before such a one."""
    if rows and suspect(rows[0]):
        return rows[:1]
    return list(takewhile(lambda row: not suspect(row), rows))


News = Change | Alert | Brake
"""What the log and the metrics hear of after the commit."""


class Upsert:
    """An INSERT that knows ON CONFLICT; both databases spell it alike, SQLAlchemy by a class for each."""

    def __init__(self, table: sa.Table, finish: Callable[[Any], Any]) -> None:
        """`finish` adds what is to be done on a conflict."""
        # By dialect.
        self.spelled = {
            "sqlite": finish(sqlite.insert(table)),
            "postgresql": finish(postgresql.insert(table)),
        }

    def run(self, unit: Unit, values: dict[str, Any]) -> "sa.CursorResult[Any]":
        """Insert the row."""
        statement = self.spelled[unit.connection.dialect.name]
        result: sa.CursorResult[Any] = unit.connection.execute(statement, values)
        return result
