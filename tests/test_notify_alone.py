"""A mail that the gateway may have fallen over goes out beside no other, and no other gateway repeats it."""

import asyncio
from email.message import EmailMessage

import pytest
import stores
from letters import LETTERHEAD
from outboxes import GIVE_UP_AFTER
from stores import TriedStore

from gateway.notify import _Sender
from gateway.records import CancelAsked, Fax
from gateway.relay import HAND_OVER_LIMIT, Relay, RelayRefused
from gateway.store_outbox import NOTICE_LEASE

store = stores.store

SUSPECT = "suspect@example.com"
OTHER = "other@example.com"


class SlowRelay(Relay):
    """A relay that is silent until the test lets it answer."""

    def __init__(self) -> None:
        super().__init__("none", "127.0.0.1", 0, hostname="fax.example.com")
        self.begun: asyncio.Queue[str] = asyncio.Queue()  # the recipients
        self.answers: dict[str, asyncio.Future[None]] = {}

    async def send(self, recipient: str, message: EmailMessage | bytes) -> None:
        """Wait for the answer."""
        del message
        self.answers[recipient] = asyncio.get_running_loop().create_future()
        self.begun.put_nowait(recipient)
        await self.answers[recipient]

    async def reached(self) -> str:
        """Return whose mail is handed over next."""
        async with asyncio.timeout(20):
            return await self.begun.get()


def sender_at(store: TriedStore, relay: Relay) -> _Sender:
    """Return one gateway's sender of mails, which takes a turn when the test says so."""
    return _Sender(store, relay, LETTERHEAD, store.clock, None, GIVE_UP_AFTER, lambda _kind, _result: None)


async def reply_to(store: TriedStore, sender: str) -> Fax:
    """Queue a reply."""
    fax = await store.queued(sender=sender)
    return await store.apply(fax.id, CancelAsked())


@pytest.mark.parametrize("taken", [True, False])
async def test_a_suspect_that_waits_for_others_stays_its_senders(store: TriedStore, taken: bool) -> None:  # noqa: FBT001 -- a parameter
    """However slow the relay is, a reply that goes out alone goes out once, and its wait does it no harm."""
    suspect = await reply_to(store, SUSPECT)
    assert len(await store.claim_notices(4)) == 1
    store.clock.now += NOTICE_LEASE  # whoever had it in hand is dead
    other = await reply_to(store, OTHER)
    await store.change(
        "UPDATE outbox SET due_at = :later WHERE fax_id = :fax", later=store.clock.now + 1, fax=suspect.id
    )
    relay = SlowRelay()
    ours, theirs = sender_at(store, relay), sender_at(store, relay)
    await ours.turn()
    assert await relay.reached() == OTHER
    store.clock.now += 1
    await ours.turn()
    assert ours.full, "nothing begins beside the suspect"
    store.clock.now += HAND_OVER_LIMIT
    await theirs.turn()
    relay.answers[OTHER].set_result(None)
    assert await relay.reached() == SUSPECT
    store.clock.now += HAND_OVER_LIMIT - 1
    assert 2 * HAND_OVER_LIMIT > NOTICE_LEASE
    await theirs.turn()
    if taken:
        relay.answers[SUSPECT].set_result(None)
    else:
        relay.answers[SUSPECT].set_exception(RelayRefused("no answer in time", permanent=False))
    async with asyncio.timeout(20):
        await ours.finish()
    assert (await store.show(other.id)).replies == (("cancelled", "sent"),)
    fate = "sent" if taken else "waiting: no answer in time"
    assert (await store.show(suspect.id)).replies == (("cancelled", fate),)
    assert not theirs._tasks
