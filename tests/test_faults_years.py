"""A daemon whose clock is decades wrong, as on a machine that has no battery and no network yet."""

import asyncio
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import stores
from faxes import DAY, NOW
from harness import World, numbers, until
from stores import SETTINGS, TriedStore, reported
from wall_clocks import Clock, clocked, refused_events

from gateway.records import Stage

store = stores.store
FREE = numbers()
YEARS = pytest.mark.parametrize("year", [1970, 2040])


def ahead(year: int) -> float:
    """Return by how many seconds a clock is ahead on which that year begins now."""
    return datetime(year, 1, 1, tzinfo=UTC).timestamp() - time.time()


async def taken_in(w: World, number: str) -> str:
    """Mail a fax, and wait until the carrier has it; return the fax's id."""
    fax_id = f"{await w.mail(number)}-1"
    await until(lambda: w.gateway.said("call_taken", fax=fax_id), "the call")
    return fax_id


async def delivered_once(w: World, number: str, fax_id: str) -> None:
    """See that the fax was delivered by its first call, and its sender told."""
    reply = await w.reply(fax_id)
    assert (reply["X-Fax-Outcome"], reply["X-Fax-Attempts"]) == ("delivered", "1")
    assert len(w.taken(number)) == 1


async def works_as_usual(w: World, clock: Clock) -> None:
    """See that with the clock set right a new fax goes its way, by events that are believed."""
    assert clock.ahead == 0.0
    number = next(FREE)
    await delivered_once(w, number, await taken_in(w, number))
    assert {sent.status for sent in w.carrier.events if sent.fax_id == w.taken(number)[0].fax_id} == {200}


@YEARS
async def test_a_clock_decades_wrong_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, year: int
) -> None:
    """The daemon starts, mail is taken and called; it is delivered when events come that it can believe."""
    async with clocked(tmp_path, monkeypatch, ahead(year)) as (w, clock):
        right, number = asyncio.Event(), next(FREE)

        async def later_tries_wait(step: str, told: dict[str, Any]) -> None:
            if step == "webhook" and told["attempt"] > 1:
                await right.wait()

        w.on_step = later_tries_wait
        fax_id = await taken_in(w, number)
        await until(lambda: w.gateway.said("webhook_refused", answer=401), "an event to be refused")
        assert w.mailbox.finals() == []
        clock.set(0.0)
        right.set()
        await delivered_once(w, number, fax_id)
        await works_as_usual(w, clock)


async def test_what_was_refused_in_1970_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the clock is right, the carrier is asked about a call of decades ago, stuck or not yet."""
    async with clocked(tmp_path, monkeypatch, ahead(1970)) as (w, clock):
        number = next(FREE)
        fax_id = await taken_in(w, number)
        await refused_events(w, number, calls=1)
        clock.set(0.0)
        await delivered_once(w, number, fax_id)
        assert {line["cause"] for line in w.gateway.said("alert_raised")} <= {"call_stuck"}
        await works_as_usual(w, clock)


async def test_what_was_refused_in_2040_is_asked_for_after_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A question that is due years from now is asked at the next start, with the clock set right."""
    async with clocked(tmp_path, monkeypatch, ahead(2040)) as (w, clock):
        number = next(FREE)
        fax_id = await taken_in(w, number)
        await refused_events(w, number, calls=1)
        await w.gateway.stop()
        clock.set(0.0)
        await w.restart()
        await delivered_once(w, number, fax_id)
        await works_as_usual(w, clock)


async def test_what_waits_by_a_clock_of_2040_goes_on_once_it_is_right(store: TriedStore) -> None:
    """A retry that was put off by a clock many years ahead is made soon after the clock was set right."""
    store.clock.now = NOW + 14 * 365 * DAY
    fax = await store.called()
    await store.webhook(reported("c1", Stage.FAILED, reason="user_busy", at=store.clock.now))
    store.clock.now = NOW
    await store.pass_time()
    again = await store.claim_call(SETTINGS)
    assert again is not None
    assert again.id == fax.id
