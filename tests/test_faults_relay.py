"""A relay that is away for hours, or refuses one recipient for ever."""

import asyncio
from pathlib import Path

import stores
from harness import letter, numbers, program_after, until, words, world
from letters import LETTERHEAD
from outboxes import GIVE_UP_AFTER
from ports import free_port
from relays import TestRelay, serving
from stores import TriedStore, newest

from gateway.bell import Bell
from gateway.notify import AT_ONCE, run
from gateway.records import Report, Reported, Stage
from gateway.relay import Relay

FREE = numbers()
HOUR = 3600.0
PROGRAM = program_after(
    """
from gateway import notify
notify.RELAY_PAUSE, notify.FIRST_WAIT, notify.LONGEST_WAIT = 0.2, 0.2, 0.4
"""
)
sqlite_store = stores.sqlite_store


async def test_a_relay_that_is_down_and_comes_back(tmp_path: Path) -> None:
    """Faxes go out meanwhile; when the relay is back every reply arrives, once, without a restart."""
    async with world(tmp_path, program=PROGRAM) as w:
        await w.mailbox.close()
        called = [next(FREE) for _ in range(6)]
        mail_id = await w.mail(*called)
        await until(lambda: len(w.gateway.said("fax_ended")) == len(called), "every fax to end")
        await until(lambda: len(w.gateway.said("reply_deferred")) > 5, "several tries")
        assert w.mailbox.mails == []
        await w.mailbox.open()
        for place in range(1, len(called) + 1):
            assert (await w.reply(f"{mail_id}-{place}"))["X-Fax-Outcome"] == "delivered"
        await w.everyone_told()
        assert len(w.mailbox.mails) == len(called)
        assert w.posts.count(called[0]) == 1


async def test_a_relay_that_is_down_for_six_hours(sqlite_store: TriedStore) -> None:
    """It is tried by one mail at a time and not stormed; when it is back each reply goes out once."""
    store, bell = sqlite_store, Bell()
    port = free_port()
    ends = []
    for place in range(10):
        fax = await store.called(f"c{place}", f"+1312555{place:04}")
        await store.apply(fax.id, Reported(newest(fax), Report(Stage.DELIVERED, asked=False, pages=1)))
        ends.append(f"<{fax.id}.delivered@")
    tries: list[str] = []

    def count(_kind: str, result: str) -> None:
        tries.append(result)
        bell.ring()

    relay = Relay("none", "127.0.0.1", port, hostname="fax.example.com")
    sending = asyncio.create_task(
        run(
            store, relay, LETTERHEAD, clock=store.clock, wake=bell.listener(), picture=None,
            give_up_after=GIVE_UP_AFTER, count=count,
        )
    )  # fmt: skip
    steps = 36
    for step in range(1, steps + 1):
        await until(lambda: len(tries) >= step, "another try")  # noqa: B023 -- awaited here
        store.clock.now += 6 * HOUR / steps
        bell.ring()
    async with serving(TestRelay(port=port)) as back:
        store.clock.now += HOUR
        bell.ring()
        await until(lambda: tries.count("sent") == len(ends), "every reply to be sent")
    sending.cancel()
    await asyncio.gather(sending, return_exceptions=True)
    assert tries.count("deferred") <= steps + AT_ONCE
    told = [mail.data.decode() for mail in back.taken]
    assert [sum(end in mail for mail in told) for end in ends] == [1] * len(ends)
    assert len(told) == len(ends)


async def test_a_relay_that_puts_off_one_recipient_for_ever(tmp_path: Path) -> None:
    """That reply is given up when its time is over and the postmaster told; others get theirs meanwhile."""
    async with world(tmp_path, program=PROGRAM, replies={"give_up_after": "2s"}) as w:

        def answer(recipient: str) -> str:
            return "450 4.2.1 try later" if recipient.startswith("away@") else "250 2.1.5 taken"

        w.mailbox.answer = answer
        lost = await w.mail(next(FREE), sender="away@example.com")
        w.accepted.pop(lost)  # nobody can be told
        await until(lambda: w.gateway.said("reply_deferred", fax=f"{lost}-1"), "the first try")
        (reply,) = await w.replies(next(FREE), message=letter(text="other"))
        assert reply["X-Fax-Outcome"] == "delivered"
        assert not w.gateway.said("reply_given_up")
        (alert,) = await until(w.mailbox.alerts, "the alert")
        assert alert["X-Fax-Alert"] == "reply_given_up"
        assert "450 4.2.1 try later" in words(alert)
        shown = await w.gateway.show(f"{lost}-1")
        assert shown["fax"]["state"] == "delivered"
        assert shown["replies"] == [["delivered", "given up: 450 4.2.1 try later"]]
        await w.everyone_told()
