"""The loop that sends mail: every mail goes out once or is given up, and none waits for another."""

import asyncio
import email
from dataclasses import replace

import pytest
import stores
from faxes import NOW, at
from letters import LETTERHEAD, alert, notice
from outboxes import DELIVERED, GIVE_UP_AFTER, looping
from relays import CUT, STALL, TestRelay, serving
from stores import POSTMASTER, SENDER, TriedStore, newest

from gateway import notify
from gateway.bell import Bell
from gateway.database import StoreUnavailable
from gateway.notify import run
from gateway.records import Notice, OutboxEntry, Report, Reported, Stage
from gateway.relay import Relay

store = stores.store


def numbered(count: int) -> list[OutboxEntry]:
    """Return replies to senders 0, 1, 2, ..."""
    return [
        replace(DELIVERED, id=f"m{place}-1.delivered", recipient=f"{place}@example.org")
        for place in range(count)
    ]


# --- sent ------------------------------------------------------------------------------------------------


async def test_each_kind_of_mail_is_sent_once() -> None:
    """Replies, alerts and mail for the postmaster go out, are recorded, counted and logged."""
    forward = OutboxEntry(
        "m1.forward", "postmaster@example.com", NOW, 0, 0, forward=b"Subject: hello\r\n\r\n"
    )
    mails = [
        *(replace(notice(kind, at("delivered").fax)) for kind in Notice),
        alert("fax_held", "Fax m1-1 is held."),
        forward,
    ]
    async with serving(TestRelay()) as relay, looping(relay) as loop:
        loop.put(*mails)
        await loop.settled(*mails)
        assert len(relay.taken) == len(mails)
        assert {fate for fate, _ in loop.shelf.fates.values()} == {"sent"}
        kinds = ["alert", "cancelled", "delayed", "delivered", "failed", "postmaster"]
        assert sorted(loop.counted) == [(kind, "sent") for kind in kinds]
        assert loop.events() == ["reply_sent"] * len(mails)
        record = next(record for record in loop.logged if record["kind"] == "delivered")
        assert record["fax"] == "m1-1"
        assert record["recipient"] == "clerk@example.org"
        assert record["relay"] == f"127.0.0.1:{relay.port}"
        assert {record["fax"] for record in loop.logged} == {
            "m1-1",
            "alert.fax_held.2026-03-02",
            "m1.forward",
        }


async def test_slow_recipient_holds_up_nobody() -> None:
    """One recipient at whom the relay falls silent holds up no other reply, however many there are."""
    slow, *others = numbered(9)
    async with serving(TestRelay(refused={slow.recipient: STALL})) as relay, looping(relay) as loop:
        loop.put(slow)
        await relay.stalled.wait()
        loop.put(*others)
        await loop.settled(*others)
        assert slow.id not in loop.shelf.fates


async def test_no_more_than_four_mails_are_on_their_way() -> None:
    """A thousand replies at once do not become a thousand connections."""
    mails = numbered(30)
    async with serving(TestRelay()) as relay, looping(relay) as loop:
        loop.put(*mails)
        await loop.settled(*mails)
        assert loop.shelf.most_held == notify.AT_ONCE


# --- tried again, given up -------------------------------------------------------------------------------


async def test_waits_between_tries_double_up_to_an_hour() -> None:
    """A greylisted reply is tried after 1, 2, 4 ... minutes, then every hour."""
    greylisting = TestRelay(refused={"clerk@example.org": "450 greylisted"})
    waits: list[float] = []
    async with serving(greylisting) as relay, looping(relay) as loop:
        loop.put(DELIVERED)
        for tries in range(1, 10):
            await loop.until(lambda: len(loop.shelf.whys) == tries)  # noqa: B023 -- awaited here
            waits.append(loop.shelf.due[DELIVERED.id] - loop.shelf.now)
            loop.wait(waits[-1] - 1)  # too early
            await loop.looked()
            assert relay.sessions == tries
            if tries == 9:
                relay.refused.clear()
            loop.wait(1)
        await loop.settled(DELIVERED)
    assert waits == [60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 3600.0, 3600.0, 3600.0]
    assert set(loop.shelf.whys) == {"450 greylisted"}
    record = loop.logged[0]
    assert record["event"] == "reply_deferred"
    assert record["error"] == "450 greylisted"
    assert record["due"] == "2026-03-02T12:01:00+00:00"
    assert loop.counted == [*[("delivered", "deferred")] * 9, ("delivered", "sent")]


async def test_refusal_for_good_ends_the_reply() -> None:
    """A sender whose address does not exist is not written to again, and the log says so."""
    refusing = TestRelay(refused={"clerk@example.org": "550 5.1.1 no such user"})
    async with serving(refusing) as relay, looping(relay) as loop:
        loop.put(DELIVERED)
        await loop.settled(DELIVERED)
    assert loop.shelf.fates[DELIVERED.id] == ("given_up", "550 5.1.1 no such user")
    assert loop.counted == [("delivered", "given_up")]
    assert loop.events() == ["reply_given_up"]


async def test_reply_is_given_up_after_its_time() -> None:
    """After the configured days a reply ends, with the last error as the reason."""
    async with serving(TestRelay(faults={"RCPT": "451 try later"})) as relay, looping(relay) as loop:
        old = replace(DELIVERED, queued_at=NOW - GIVE_UP_AFTER)
        young = replace(old, id="m2-1.delivered", queued_at=NOW - GIVE_UP_AFTER + 1)
        loop.put(old, young)
        await loop.settled(old)
        await loop.until(lambda: young.id in loop.shelf.due)
        assert loop.shelf.fates == {old.id: ("given_up", "451 try later")}


async def test_silence_after_the_dot_repeats_the_same_mail() -> None:
    """A reply whose fate is unknown goes out again under the same Message-ID, so that it is recognised."""
    async with serving(TestRelay(faults={"DOT": STALL})) as relay, looping(relay, hand_over=0.3) as loop:
        loop.put(DELIVERED)
        await loop.until(lambda: loop.shelf.whys)
        relay.faults.clear()
        loop.wait(60.0)
        await loop.settled(DELIVERED)
        arrived = email.message_from_bytes(relay.taken[-1].data)
        assert arrived["Message-ID"] == "<m1-1.delivered@fax.local>"
        assert "no answer in time" in loop.shelf.whys[0]


async def test_absent_relay_is_asked_by_one_mail_at_a_time() -> None:
    """While the relay is away it is not stormed; when it is back, everything goes out."""
    mails = numbered(20)
    async with serving(TestRelay(faults={"GREETING": "421 closed"})) as relay, looping(relay) as loop:
        loop.put(*mails)
        await loop.until(lambda: len(loop.shelf.whys) == notify.AT_ONCE)
        for probe in range(1, 4):
            loop.wait(notify.RELAY_PAUSE - 1)  # too early
            await loop.looked()
            assert relay.sessions == notify.AT_ONCE + probe - 1
            loop.wait(1)
            await loop.until(lambda: len(loop.shelf.whys) == notify.AT_ONCE + probe)  # noqa: B023 -- awaited here
            assert relay.sessions == notify.AT_ONCE + probe
        relay.faults.clear()
        loop.shelf.most_held = 0
        loop.wait(3600.0)
        await loop.settled(*mails)
        assert loop.shelf.most_held == notify.AT_ONCE
    assert len(relay.taken) == len(mails)


async def test_clock_set_back_does_not_prolong_the_pause() -> None:
    """After a correction of the clock, replies do not wait for the old time to come again."""
    first, second = numbered(2)
    async with serving(TestRelay(faults={"GREETING": CUT})) as relay, looping(relay) as loop:
        loop.put(first)
        await loop.until(lambda: loop.shelf.whys)
        relay.faults.clear()
        loop.wait(-7200.0)
        loop.put(second)
        await loop.settled(second)


# --- faults of our own -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "event"),
    [(StoreUnavailable("locked"), "store_failed"), (RuntimeError("unforeseen"), "task_failed")],
)
async def test_loop_outlives_a_store_that_fails(fault: Exception, event: str) -> None:
    """When the store is away the loop waits for it, and then goes on."""
    async with serving(TestRelay()) as relay, looping(relay) as loop:
        loop.shelf.broken["claim"] = fault
        loop.put(DELIVERED)
        await loop.until(lambda: event in loop.events())
        loop.shelf.broken.clear()
        loop.bell.ring()
        await loop.settled(DELIVERED)


async def test_mail_that_could_not_be_recorded_is_not_sent_again() -> None:
    """A full disk does not make the gateway repeat a reply that the relay has taken."""
    async with serving(TestRelay()) as relay, looping(relay) as loop:
        loop.shelf.broken["sent"] = StoreUnavailable("disk full")
        loop.put(DELIVERED)
        await loop.until(lambda: "store_failed" in loop.events())
        loop.shelf.broken.clear()
        loop.put(loop.shelf.entries[DELIVERED.id])  # its claim lapses
        await loop.settled(DELIVERED)
        assert len(relay.taken) == 1
        assert loop.counted == [("delivered", "sent")]


async def test_broken_entry_harms_no_other() -> None:
    """A mail that cannot be written is put off and reported; those behind it go out."""
    broken = OutboxEntry("m9-1.delivered", "clerk@example.org", NOW, 0, 0)
    async with serving(TestRelay()) as relay, looping(relay) as loop:
        loop.put(broken, DELIVERED)
        await loop.settled(DELIVERED)
        await loop.until(lambda: loop.shelf.whys)
        assert "task_failed" in loop.events()
        assert "m9-1.delivered is neither" in loop.shelf.whys[0]
        loop.shelf.broken["deferred"] = StoreUnavailable("locked")
        again = replace(broken, id="m8-1.delivered")
        other = replace(DELIVERED, id="m2-1.delivered")
        loop.put(again, other)
        await loop.settled(other)


async def test_stop_lets_a_mail_arrive() -> None:
    """When the gateway stops, a mail on its way is finished and recorded."""
    refused = {DELIVERED.recipient: STALL}
    async with serving(TestRelay(refused=refused)) as relay, looping(relay) as loop:
        loop.put(DELIVERED)
        await relay.stalled.wait()
        loop.task.cancel()
        await asyncio.wait({loop.task}, timeout=0.05)
        assert not loop.task.done()
        relay.released.set()
        with pytest.raises(asyncio.CancelledError):
            await loop.task
        assert loop.shelf.fates == {DELIVERED.id: ("sent", "")}
        assert len(relay.taken) == 1


async def test_second_stop_does_not_wait() -> None:
    """When the time to stop is over, a mail on its way is left for the next start."""
    async with serving(TestRelay(faults={"DOT": STALL})) as relay, looping(relay) as loop:
        loop.put(DELIVERED)
        await relay.stalled.wait()
        loop.task.cancel()
        await asyncio.wait({loop.task}, timeout=0.05)
        loop.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await loop.task
        assert loop.shelf.fates == {}
        assert loop.shelf.whys == ["the gateway stopped"]


# --- with the real store ---------------------------------------------------------------------------------


async def test_outbox_of_the_real_store(store: TriedStore) -> None:
    """A reply is put off, tried again, refused for good, and then the postmaster is told."""
    bell = Bell()
    fax = await store.called()
    await store.apply(fax.id, Reported(newest(fax), Report(Stage.DELIVERED, asked=False, pages=3)))
    async with serving(TestRelay(refused={SENDER: "450 greylisted"})) as relay:
        sending = asyncio.create_task(
            run(
                store,
                Relay("none", "127.0.0.1", relay.port, hostname="fax.example.com"),
                LETTERHEAD,
                clock=store.clock,
                wake=bell.listener(),
                picture=None,
                give_up_after=GIVE_UP_AFTER,
                count=lambda _kind, _result: bell.ring(),
            )
        )
        watch = bell.listener()

        async def until(condition: str) -> None:
            query = "SELECT 1 FROM outbox WHERE " + condition  # noqa: S608 -- the test's own words
            async with asyncio.timeout(20):
                while not await store.rows(query):
                    await watch.wait(0.05)

        await until("tries = 1 AND error = '450 greylisted'")
        store.clock.now += 60.0
        relay.refused[SENDER] = "550 5.1.1 no such user"
        bell.ring()
        await until("given_up_at IS NOT NULL")
        await until("cause = 'reply_given_up' AND sent_at IS NOT NULL")
        assert [mail.recipient for mail in relay.taken] == [POSTMASTER]
        assert f"{fax.id}.delivered".encode() in relay.taken[0].data
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
