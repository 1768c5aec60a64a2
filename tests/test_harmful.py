"""A fax that the daemon falls over each time it is touched: it is set aside, and all others go their way."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from harness import World, numbers, program_after, until, words, world

MARKED = "+13125560666"
STARTS = 20  # that the test allows until the fax is set aside
FREE = numbers()

KILLED_BY_POST = """
import os, signal
from gateway import fax_steps
fax_steps.APART = 1.0  # seconds between calls that were lost together
from gateway.telnyx import Telnyx
send = Telnyx.send
async def fatal(self, call, may_begin):
    if call.number == {number!r}:
        os.kill(os.getpid(), signal.SIGKILL)
    return await send(self, call, may_begin)
Telnyx.send = fatal
"""
KILLED_BY_QUESTION = """
import os, signal
from gateway import store_work
store_work.QUESTION_LEASE = 1.0  # seconds that the next start waits for the dead one
from gateway.dispatch import Dispatcher
ask = Dispatcher._ask_carrier
async def fatal(self, fax):
    if fax.number == {number!r}:
        os.kill(os.getpid(), signal.SIGKILL)
    return await ask(self, fax)
Dispatcher._ask_carrier = fatal
"""
KILLED_BY_REPLY = """
import os, signal
from gateway import notify, store_outbox
store_outbox.NOTICE_LEASE = 1.0
compose = notify.compose
def fatal(entry, *others):
    if entry.fax is not None and entry.fax.number == {number!r}:
        os.kill(os.getpid(), signal.SIGKILL)
    return compose(entry, *others)
notify.compose = fatal
"""


@contextlib.asynccontextmanager
async def mined(folder: Path, lines: str) -> AsyncIterator[World]:
    """Open a world whose daemon kills itself as `lines` say, at work on the marked number."""
    async with world(folder, program=program_after(lines.format(number=MARKED))) as w:
        yield w


async def mail_at_once(w: World, others: int) -> tuple[str, list[str]]:
    """Mail to the marked number amid others, so that all begin together; return its fax and theirs."""
    await w.gateway.run("hold", "--all")
    before = [f"{await w.mail(next(FREE))}-1" for _ in range(others // 2)]
    marked = f"{await w.mail(MARKED)}-1"
    after = [f"{await w.mail(next(FREE))}-1" for _ in range(others - others // 2)]
    await w.gateway.run("release", "--all")
    return marked, before + after


async def live_through(w: World, *alerts: str) -> int:
    """Start the daemon whenever it is dead, until an alert has one of these texts; return the starts."""

    def alerted() -> bool:
        return any(word in words(mail) for mail in w.mailbox.alerts() for word in alerts)

    for starts in range(STARTS):
        await until(
            lambda: w.gateway._ended() or alerted(), "the daemon to die, or the postmaster to be told"
        )
        if alerted():
            return starts
        with contextlib.suppress(AssertionError):  # it may be dead again before it was ready
            await w.restart()
    pytest.fail(f"dead again after {STARTS} starts")


@pytest.mark.parametrize(
    ("lines", "detail"),
    [
        (KILLED_BY_POST, "call after call was lost on its way to the carrier"),
        (KILLED_BY_QUESTION, "the gateway came to an end at each question about it"),
    ],
    ids=["at its POST", "at a question about it"],
)
async def test_a_fax_that_kills_the_daemon_is_set_aside(tmp_path: Path, lines: str, detail: str) -> None:
    """After five deaths over one fax it is held, the postmaster is told, and every other fax is delivered."""
    async with mined(tmp_path, lines) as w:
        if lines is KILLED_BY_QUESTION:
            w.carrier.set_webhook_url(None)  # so that each call must be asked about
        marked, others = await mail_at_once(w, 6)
        if lines is KILLED_BY_QUESTION:
            await until(lambda: len(w.gateway.said("call_taken")) == 7, "the calls")
            await w.gateway.kill()  # a new start asks about all of them at once
        assert await live_through(w, f"Fax {marked} is held: {detail}.") >= 5
        shown = (await w.gateway.show(marked))["fax"]
        assert (shown["state"], shown["held_for"], shown["held_detail"]) == ("held", "harmful", detail)
        for fax_id in others:
            assert (await w.reply(fax_id))["X-Fax-Outcome"] == "delivered"
        assert await w.reply(marked, "delayed")
        assert w.taken(MARKED) == [] or lines is KILLED_BY_QUESTION
        assert (await w.gateway.run("cancel", marked))[0] == 0
        await w.everyone_told()


async def test_a_reply_that_kills_the_daemon_is_given_up(tmp_path: Path) -> None:
    """After five deaths over one reply it is given up, the postmaster reads of which fax, the others come."""
    async with mined(tmp_path, KILLED_BY_REPLY) as w:
        marked, others = await mail_at_once(w, 6)
        assert await live_through(w, f"The mail {marked}.delivered could not be handed over") >= 5
        for fax_id in others:
            assert (await w.reply(fax_id))["X-Fax-Outcome"] == "delivered"
        shown = await w.gateway.show(marked)
        assert shown["fax"]["state"] == "delivered"
        assert [reply for reply in shown["replies"] if reply[1].startswith("given up")] == shown["replies"]
        assert len(w.taken(MARKED)) == 1
