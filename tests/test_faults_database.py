"""Databases that fail under a real daemon: locked, away, there and silent, restarted, sessions ended."""

import asyncio
import contextlib
import smtplib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from email.message import EmailMessage
from functools import partial
from pathlib import Path
from signal import SIGINT, SIGQUIT
from typing import Any

import aiohttp
import postgres
import pytest
import pytest_asyncio
from crashes import locked
from harness import PATIENCE, World, letter, numbers, program_after, until, world
from postgres import Server

from gateway import postgresql

pytestmark = pytest.mark.asyncio(loop_scope="module")
FREE = numbers()
ANSWER_LIMIT, CONNECT_LIMIT = 2.0, 2
STORE_AWAY = 0.5  # seconds until a loop tries again
POST_LIMIT, CALL_LEASE = 4.0, 6.0  # seconds: an answer still comes when the store is away
PROGRAM = program_after(
    f"""
import short_leases
short_leases.POST_LIMIT, short_leases.CALL_LEASE = {POST_LIMIT}, {CALL_LEASE}
short_leases.shorten()
from gateway import dispatch, notify, postgresql
dispatch._STORE_AWAY = notify.STORE_PAUSE = {STORE_AWAY}
postgresql.ANSWER_LIMIT = postgresql._Connection.patience = {ANSWER_LIMIT}
postgresql.CONNECT_LIMIT = {CONNECT_LIMIT}
"""
)
PATIENT_FOR = 0.3  # seconds that a daemon with SQLite waits for somebody else's write
FILE_PROGRAM = program_after(
    f"""
from functools import partial
from gateway import dispatch, notify, sqlite
dispatch._STORE_AWAY = notify.STORE_PAUSE = {STORE_AWAY}
sqlite.SqliteDatabase = partial(sqlite.SqliteDatabase, busy_timeout={PATIENT_FOR})
"""
)
ASKS_SOON = {"poll_after": "1s"}  # the carrier gives up some events while the store is away
LOOPS = ("calls", "questions", "caretaker", "claim_notices")
TRIES = 5  # to reach the server in vain, a pause of the gateway's (`AWAY_PAUSE`) between two of them


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[Server]:
    """Return a server of our own, which may be ill-treated."""
    made = postgres.new_server()
    await asyncio.to_thread(made.start)
    yield made
    await asyncio.to_thread(made.stop, SIGQUIT)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def w(server: Server, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """One world for all tests of this file; at its end every fax has exactly one final reply."""
    folder = tmp_path_factory.mktemp("postgresql")
    environ = {"STATE_DIRECTORY": str(folder), "PYTHONPATH": str(Path(__file__).parent)}
    url = await asyncio.to_thread(server.create)
    checks = ["500ms", "2s", "4s", f"{CALL_LEASE + POST_LIMIT + 1.0:.0f}s"]
    async with world(
        folder,
        program=PROGRAM,
        environ=environ,
        store={"url": url},
        telnyx={"doubt_checks": checks} | ASKS_SOON,
    ) as made:
        yield made
        await made.everyone_told()


async def asked(w: World, path: str) -> int:
    """Return how the daemon answers a GET."""
    async with (
        aiohttp.ClientSession() as client,
        client.get(f"http://127.0.0.1:{w.gateway.http_port}{path}") as response,
    ):
        return response.status


async def ready(w: World) -> None:
    """Return when the daemon says that it is ready."""
    async with asyncio.timeout(PATIENCE):
        while await asked(w, "/readyz") != 200:  # noqa: ASYNC110 -- another process rings no bell here
            await asyncio.sleep(0.05)


def heard(w: World, number: str) -> list[int | None]:
    """Return what the carrier's events about the one fax to a number were answered."""
    return [event.status for event in w.carrier.events if event.fax_id == w.taken(number)[0].fax_id]


def once_each(w: World, *called: str) -> None:
    """See that the carrier was asked for each of these calls once, and took it once."""
    assert [w.posts.count(number) for number in called] == [1] * len(called)
    assert [len(w.taken(number)) for number in called] == [1] * len(called)


@contextlib.asynccontextmanager
async def away(w: World, within: float) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """Have faxes under way while the store is away, and see that in the end each of them was sent once.

    The block takes the store away, awaits what it is given, and brings the store back. Mail must be put off
    `within` so many seconds.
    """
    answered, told, later = next(FREE), next(FREE), next(FREE)
    accepted, gone, back = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def on_step(step: str, about: dict[str, Any]) -> None:
        if step == "accepted" and about["to"] == answered:
            accepted.set()
            await gone.wait()
        if step == "webhook" and about["event"]["payload"]["to"] == told:
            await (gone if about["attempt"] < 3 else back).wait()

    w.on_step = on_step
    fax = f"{await w.mail(told)}-1"
    await until(lambda: w.gateway.said("call_taken", fax=fax), "the call")
    await w.mail(answered)
    await asyncio.wait_for(accepted.wait(), PATIENCE)
    w.gateway.log.clear()
    message = letter(later)
    begun = time.monotonic()

    async def failed() -> None:
        asked_at = time.monotonic()
        with pytest.raises(smtplib.SMTPResponseException) as refused:
            await w.mail(later, message=message)
        assert refused.value.smtp_code == 451
        assert time.monotonic() - asked_at < within
        gone.set()
        await until(lambda: 503 in heard(w, told), "an event to be put off")
        await until(lambda: w.gateway.said("store_failed", verb="Taken"), "the carrier's answer to be kept")
        await until(lambda: len(w.gateway.said("store_failed", verb="calls")) > 1, "a second try")

    yield failed
    await ready(w)
    back.set()
    lasted = time.monotonic() - begun
    await mail_until_taken(w, later, message)
    await w.everyone_told()
    once_each(w, answered, told, later)
    assert 200 in heard(w, told)
    for loop in LOOPS:  # each tries again after its pause, and when it is woken
        assert len(w.gateway.said("store_failed", verb=loop)) <= lasted / STORE_AWAY + 2.0


async def test_a_database_that_another_program_keeps_locked(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Locked for long: mail hears 451, events 503, the log stays short; then all goes on, each fax once."""
    folder = tmp_path_factory.mktemp("locked")
    async with (
        world(folder, program=FILE_PROGRAM, telnyx=ASKS_SOON) as w,
        away(w, PATIENT_FOR + 2.0) as failed,
    ):
        with locked(folder / "gateway.db"):
            await failed()
            assert await asked(w, "/healthz") == 200


async def test_postgresql_stopped_for_a_while(w: World, server: Server) -> None:
    """No server for five tries: at once 451, 503, "not ready"; when it is back all goes on, each fax once."""
    async with away(w, 2.0) as failed:
        await asyncio.to_thread(server.stop, SIGINT)
        await failed()
        await until(lambda: len(in_vain(w)) >= TRIES, "the daemon to try again and again")
        assert (await asked(w, "/readyz"), await asked(w, "/healthz")) == (503, 200)
        await asyncio.to_thread(server.start)


async def test_postgresql_silent_for_a_while(w: World, server: Server) -> None:
    """A server that hangs: 451 and 503 in bounded time, "not ready"; then all goes on, each fax once."""
    async with away(w, ANSWER_LIMIT + CONNECT_LIMIT + 2.0) as failed:
        await asyncio.to_thread(server.freeze)
        await failed()
        assert (await asked(w, "/readyz"), await asked(w, "/healthz")) == (503, 200)
        await asyncio.to_thread(server.thaw)


def in_vain(w: World) -> list[dict[str, Any]]:
    """Return the log lines of tries to reach the server, without those that a pause forbade."""
    return [line for line in w.gateway.said("store_failed") if "Connection refused" in line["error"]]


async def restarted(server: Server) -> None:
    """Let the server crash, and start it again."""
    await asyncio.to_thread(server.stop, SIGQUIT)
    await asyncio.to_thread(server.start)


async def ended(server: Server) -> None:
    """End all sessions of the daemon."""
    await asyncio.to_thread(
        server.execute,
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'fax-gateway'",
    )


@pytest.mark.parametrize(("strike", "times"), [(restarted, 1), (ended, 4)])
async def test_postgresql_gone_in_the_middle_of_traffic(
    w: World, server: Server, strike: Callable[[Server], Awaitable[None]], times: int
) -> None:
    """Crashed and restarted, or its sessions ended, amid a stream of mails: each is one fax, one reply."""
    w.on_step = None
    called = [next(FREE) for _ in range(30)]
    left, done = iter(called), []

    async def client() -> None:
        for number in left:
            await mail_until_taken(w, number, letter(number))
            done.append(number)

    clients = [asyncio.create_task(client()) for _ in range(4)]
    for turn in range(1, times + 1):
        await until(partial(at_least, done, 5 * turn), "some of the mails")
        await strike(server)
    await asyncio.gather(*clients)
    await w.everyone_told()
    assert [len(w.taken(number)) for number in called] == [1] * len(called)


def at_least(done: list[str], count: int) -> bool:
    """Whether so many are done."""
    return len(done) >= count


async def mail_until_taken(w: World, number: str, message: EmailMessage) -> None:
    """Mail it as a mail server does: again, for as long as it is put off."""
    async with asyncio.timeout(PATIENCE):
        while True:
            with contextlib.suppress(smtplib.SMTPResponseException):
                await w.mail(number, message=message)
                return
            await asyncio.sleep(0.1)


async def test_a_silent_server_is_given_up_before_the_client_gives_us_up() -> None:
    """Asking a server that does not answer, and connecting anew in vain, take less than the door's 30 s."""
    assert postgresql.ANSWER_LIMIT + postgresql.CONNECT_LIMIT < 30.0
    assert postgresql._Connection.patience == postgresql.ANSWER_LIMIT
    # What only takes long is ended by the server, before it counts as silent.
    assert all(
        float(limit.removesuffix("s")) < postgresql.ANSWER_LIMIT for limit in postgresql._LIMITS.values()
    )
