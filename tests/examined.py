"""What the store is asked to do while its statements are looked at: every verb, in situations that differ.

`VERBS` are named after the store's methods; each works on a store that `fill` prepared.
"""

import io
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from faxes import DAY, FROM, NUMBER
from stores import SETTINGS, TriedStore, newest, reported

from gateway.doubt import Sighting
from gateway.records import (
    Blame,
    CancelAsked,
    Doubted,
    HoldAsked,
    OperatorEvent,
    Rejected,
    ReleaseAsked,
    RetryAsked,
    Stage,
    TimePassed,
    Withdrawn,
)
from gateway.store_intake import CHUNK

OTHER = "+13125550199"
UNKNOWN = [reported("c11", None, number=OTHER).sighting]  # a call that a backup does not know

Verb = Callable[[TriedStore], Awaitable[Any]]


async def fill(store: TriedStore) -> None:
    """Store faxes in several situations, an event of nobody, and a hold of the account."""
    for n in range(3):
        await store.called(f"c{n}", f"+131255500{n:02}", message_id=f"<{n}>", window=DAY)
        await store.webhook(reported(f"c{n}", Stage.DELIVERED, number=f"+131255500{n:02}"))
        await store.mail_out()
    await store.called("c9")
    await store.queued(OTHER)
    cancelled = await store.queued("+13125550198")
    await store.apply(cancelled.id, CancelAsked())
    await store.webhook(reported("c8", Stage.DIALLED))
    await store.change("INSERT INTO brakes VALUES ('hold', 'account', 'HTTP 401', 0, 0, 60, 1)")


async def waiting(store: TriedStore) -> str:
    """Return the id of a fax that waits for its call."""
    return (await store.list_faxes(("queued",), 1))[0].id


async def repeated(store: TriedStore) -> None:
    """Take in a mail twice."""
    for _ in range(2):
        await store.mail_in(OTHER, message_id="<again>", window=DAY)


async def wish(store: TriedStore, *wishes: OperatorEvent) -> None:
    """Wish something of a fax that waits."""
    fax_id = await waiting(store)
    for event in wishes:
        await store.apply(fax_id, event)


async def asked(store: TriedStore) -> None:
    """Finish a question."""
    await store.asked(await waiting(store))


async def refused(store: TriedStore) -> None:
    """Let the carrier refuse a call for what the account is held for."""
    fax = await store.claimed()
    await store.apply(fax.id, Rejected(newest(fax), Blame.SUSPECT, "HTTP 401", "account_refused"))


async def taken_as(store: TriedStore, carrier_id: str) -> None:
    """Let the carrier take a call under this id."""
    await store.taken(await store.claimed(), carrier_id)


async def has_rival(store: TriedStore) -> None:
    """Look for another call that is in doubt."""
    fax = await store.claimed()
    await store.has_rival(fax, fax.attempts[-1])


async def restoring(store: TriedStore) -> None:
    """Begin a restore, and ask what it is about."""
    await store.begin_restore()
    assert await store.restoring() is not None


async def restored(store: TriedStore, sent: list[Sighting] | None) -> None:
    """Begin a restore, and end it."""
    await store.begin_restore()
    await store.end_restore(sent, None)


async def withdrawn(store: TriedStore) -> None:
    """Claim a call, and make none, since the clock was set."""
    store.clock.now -= 90 * DAY
    fax = await store.claimed()
    await store.apply(fax.id, Withdrawn(newest(fax), "an earlier attempt", 60.0))


async def doubted(store: TriedStore) -> None:
    """Hear of a call whose answer is missing."""
    fax = await store.claimed()
    await store.apply(fax.id, Doubted(newest(fax), "timeout"))
    await store.webhook(reported("c12", Stage.DIALLED, number=fax.number, at=store.clock.now))


async def with_notice(store: TriedStore, end: Callable[[str, int], Awaitable[bool]]) -> None:
    """Claim a mail, and let it end so."""
    [entry, *_] = await store.claim_notices(1)
    assert await end(entry.id, entry.fence)


VERBS: dict[str, Verb] = {
    "accept": lambda store: store.mail_in(message_id="<9>", window=DAY),
    "accept, a repeat": repeated,
    "apply": lambda store: store.apply(store.changes[-1].after.id, TimePassed()),
    "apply, cancel": lambda store: wish(store, CancelAsked()),
    "apply, hold and release": lambda store: wish(store, HoldAsked(), ReleaseAsked()),
    "apply, retry": lambda store: wish(store, RetryAsked()),
    "apply, refused": refused,
    "apply, withdrawn": withdrawn,
    "apply, another's call": lambda store: taken_as(store, "c9"),
    "apply, events parked": lambda store: taken_as(store, "c8"),
    "asked": asked,
    "begin_restore": lambda store: store.begin_restore(),
    "bound_ids": lambda store: store.bound_ids(["c1", "c2"]),
    "claim_call": lambda store: store.claim_call(SETTINGS),
    "claim_notices": lambda store: store.claim_notices(3),
    "claim_questions": lambda store: store.claim_questions(4),
    "count": lambda store: store.count(),
    "document": lambda store: store.document("d9"),
    "end_restore": lambda store: restored(store, []),
    "end_restore, a call unknown": lambda store: restored(
        store, [reported("c11", None, number=OTHER).sighting]
    ),
    "end_restore, no answer": lambda store: restored(store, None),
    "evidence": lambda store: store.evidence(NUMBER, FROM),
    "fax_ids_of": lambda store: store.fax_ids_of("m9"),
    "evidence, from a new number": lambda store: store.evidence(NUMBER, "+13125550999"),
    "has_rival": has_rival,
    "hold_all": lambda store: store.hold_all(),
    "keep_document": lambda store: store.keep_document(io.BytesIO(b"x" * (CHUNK + 1))),
    "list_faxes": lambda store: store.list_faxes((), 50),
    "list_faxes, ended": lambda store: store.list_faxes(("failed", "cancelled"), 50),
    "notice_deferred": lambda store: with_notice(store, partial(store.notice_deferred, wait=60.0, why="450")),
    "notice_given_up": lambda store: with_notice(store, partial(store.notice_given_up, why="550")),
    "notice_sent": lambda store: with_notice(store, store.notice_sent),
    "paper_of": lambda store: store.paper_of(store.changes[0].after.mail_id),
    "pass_time": lambda store: store.pass_time(),
    "purge": lambda store: store.purge(0.0, 0.0),
    "release_all": lambda store: store.release_all(),
    "remember_event, of a call": lambda store: store.webhook(reported("c9", Stage.DIALLED)),
    "remember_event, of a doubt": doubted,
    "remember_event, of nobody": lambda store: store.webhook(reported("c10", Stage.DIALLED)),
    "renew": lambda store: store.renew(store.changes[0].after.id, even_if_twice=True),
    "restoring": restoring,
    "show": lambda store: store.show(store.changes[0].after.id),
    "sweep_parked": lambda store: store.sweep_parked(),
    "take_over": lambda store: store.take_over(FROM),
}
