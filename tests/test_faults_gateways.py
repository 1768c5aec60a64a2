"""Two gateways at one PostgreSQL, one of them frozen or killed: no call twice, one reply."""

import asyncio
import contextlib
import copy
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import postgres
import psycopg
import pytest
import pytest_asyncio
from crashes import Gate
from harness import Gateway, World, letter, numbers, program_after, until, world

pytestmark = pytest.mark.asyncio(loop_scope="module")
FREE = numbers()
HERE = str(Path(__file__).parent)
POST_LIMIT, CALL_LEASE, LAST_CHECK = 1.0, 2.0, "3500ms"  # seconds
PROGRAM = program_after(
    f"""
import short_leases
short_leases.POST_LIMIT, short_leases.CALL_LEASE = {POST_LIMIT}, {CALL_LEASE}
short_leases.shorten()
from gateway import postgresql
# A gateway may be frozen in the middle of a transaction, and holds up the other until the server ends it.
postgresql._LIMITS["idle_in_transaction_session_timeout"] = "1s"
# Who sleeps in the middle of a statement shall find its answer when it wakes.
postgresql.ANSWER_LIMIT = postgresql._Connection.patience = 120.0
"""
)
DEAF = program_after(
    f"""
import short_leases
short_leases.POST_LIMIT, short_leases.CALL_LEASE = {POST_LIMIT}, {CALL_LEASE}
short_leases.shorten()
from gateway import postgresql
postgresql.PostgresqlDatabase._listen_loop = lambda self: None
"""
)


@dataclass
class Pair:
    """Two gateways at one database; `w` has the first."""

    w: World
    two: Gateway
    url: str

    @property
    def gateways(self) -> tuple[Gateway, Gateway]:
        """Both."""
        return self.w.gateway, self.two

    def other(self, gateway: Gateway) -> Gateway:
        """Return the one that is not this one."""
        return self.two if gateway is self.w.gateway else self.w.gateway

    async def called(self, number: str, behaviour: str = "delivered") -> tuple[str, Gateway, Gate]:
        """Mail a letter; return its fax, the gateway that calls, and the gate behind which the carrier waits.

        The carrier has read the POST. Its events go to the other gateway.
        """
        gate = Gate()

        async def wait(step: str, about: dict[str, Any]) -> None:
            if step == "body_read" and about["to"] == number:
                await gate.hold()

        self.w.carrier.set_script({number: [behaviour, "delivered"]})
        self.w.on_step = wait
        fax = f"{await self.w.mail(number)}-1"
        await gate.reached()
        caller = await self.caller(fax)
        self.w.carrier.set_webhook_url(self.other(caller).webhook_url)
        return fax, caller, gate

    async def caller(self, fax: str) -> Gateway:
        """Wait until a gateway begins to call, and return it."""
        found: list[Gateway] = await until(
            lambda: [one for one in self.gateways if one.said("call_begun", fax=fax)], "the call to begin"
        )
        return found[0]

    async def settled(self) -> None:
        """See that every fax has one final reply, and that neither gateway complains of the unforeseen."""
        await self.w.everyone_told()
        assert (self.two.said("task_failed"), self.two.stderr) == ([], "")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Pair]:
    """Two gateways for all tests of this file; at the end every fax has exactly one final reply."""
    folders = [tmp_path_factory.mktemp(name) for name in ("one", "two")]
    url = await asyncio.to_thread(lambda: postgres.server().create(postgres.template()))
    environs = [{"STATE_DIRECTORY": str(at), "PYTHONPATH": HERE} for at in folders]
    checks = {"doubt_checks": ["500ms", "1s", "2500ms", LAST_CHECK], "poll_after": "2s"}
    async with world(
        folders[0], program=PROGRAM, environ=environs[0], store={"url": url}, telnyx=checks,
        log={"mask_numbers": False},
    ) as w:  # fmt: skip
        settings = copy.deepcopy(w.gateway.settings)
        settings["smtp"]["listen"] = settings["http"]["listen"] = "127.0.0.1:0"
        two = Gateway(folders[1], settings, PROGRAM, environs[1])
        try:
            await two.start()
            made = Pair(w, two, url)
            yield made
            await made.settled()
        finally:
            await two.close()
    await asyncio.to_thread(postgres.server().drop, url)


@contextlib.contextmanager
def frozen(gateway: Gateway) -> Iterator[None]:
    """Let a gateway stand still; it wakes up at the end."""
    os.kill(gateway.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(gateway.pid, signal.SIGCONT)


async def test_a_gateway_frozen_while_it_waits_for_the_carriers_answer(pair: Pair) -> None:
    """The other finds the call in the carrier's list and tells its end; the sleeper adds nothing to it."""
    w, number = pair.w, next(FREE)
    fax, caller, gate = await pair.called(number, "slow-answer")
    with frozen(caller):
        gate.open()
        await until(lambda: pair.other(caller).said("doubt_checked", fax=fax, verdict="Bind"), "the find")
        assert (await w.reply(fax))["X-Fax-Outcome"] == "delivered"
    await until(
        lambda: caller.said("call_taken", fax=fax) or caller.said("call_in_doubt", fax=fax), "it to wake up"
    )
    await pair.settled()
    assert w.posts.count(number) == len(w.taken(number)) == 1


async def test_a_gateway_frozen_before_it_hands_the_call_over(pair: Pair) -> None:
    """The other proves that nothing was sent, and sends it; the sleeper, past its lease, sends no byte."""
    w, number = pair.w, next(FREE)
    w.on_step = None
    assert (await w.gateway.run("hold", "--all"))[0] == 0
    fax = f"{await w.mail(number)}-1"
    with psycopg.connect(pair.url) as somebody:
        somebody.execute("LOCK TABLE document_chunks IN ACCESS EXCLUSIVE MODE")
        assert (await w.gateway.run("release", "--all"))[0] == 0
        caller = await pair.caller(fax)
        w.carrier.set_webhook_url(pair.other(caller).webhook_url)
        os.kill(caller.pid, signal.SIGSTOP)
    try:
        assert (await w.reply(fax))["X-Fax-Outcome"] == "delivered"
        assert pair.other(caller).said("doubt_checked", fax=fax, verdict="ProvedAbsent")
    finally:
        os.kill(caller.pid, signal.SIGCONT)
    # It has read the document too late, or the server ended its reading while it slept.
    await until(
        lambda: (
            caller.said("call_unavailable", fax=fax, cause="lease ran out")
            or caller.said("store_failed", fax=fax, verb="call")
        ),
        "it to wake up",
    )
    await pair.settled()
    assert w.posts.count(number) == len(w.taken(number)) == 1


@pytest.mark.parametrize(("answer", "posts"), [("silence-after-acceptance", 1), ("silence", 2)])
async def test_a_gateway_killed_in_mid_call(pair: Pair, answer: str, posts: int) -> None:
    """After the lease the other takes over: what the carrier took it finds, what it did not take it sends."""
    w, number = pair.w, next(FREE)
    fax, caller, gate = await pair.called(number, answer)
    gate.open()
    await until(lambda: len(w.taken(number)) == 2 - posts, "the carrier's decision")
    await caller.kill()
    assert (await w.reply(fax))["X-Fax-Outcome"] == "delivered"
    assert pair.other(caller).said("doubt_checked", fax=fax)
    await caller.start()
    await pair.settled()
    assert (w.posts.count(number), len(w.taken(number))) == (posts, 1)


@pytest.mark.parametrize("behaviour", ["delivered", "webhooks-before-answer"])
async def test_events_that_come_to_the_other_gateway(pair: Pair, behaviour: str) -> None:
    """Whichever gateway made a call, the other takes its events, also those that come before the answer."""
    w, number = pair.w, next(FREE)
    fax, caller, gate = await pair.called(number, behaviour)
    gate.open()
    assert (await w.reply(fax))["X-Fax-Outcome"] == "delivered"
    carrier_id = w.taken(number)[0].fax_id
    await until(lambda: len(of(w, carrier_id)) == 4, "the last answer to an event")
    assert of(w, carrier_id) == [200] * 4
    assert len(pair.other(caller).said("webhook_received", carrier_id=carrier_id)) == 4
    assert caller.said("webhook_received", carrier_id=carrier_id) == []
    await pair.settled()
    assert w.posts.count(number) == len(w.taken(number)) == 1


def of(w: World, carrier_id: str) -> list[int | None]:
    """Return how the events of a call were answered."""
    return [event.status for event in w.carrier.events if event.fax_id == carrier_id]


async def test_a_hold_through_one_gateway_stops_the_other(pair: Pair) -> None:
    """A second after `hold --all` at one gateway the other calls nobody, until `release --all` at either."""
    w = pair.w
    w.on_step = None
    one, two = pair.gateways
    assert (await one.run("hold", "--all"))[0] == 0
    held = time.monotonic()
    called = [next(FREE) for _ in range(4)]
    made = [
        await w.mail(number, gateway=gateway) for number, gateway in zip(called, (one, two) * 2, strict=True)
    ]
    await until(lambda: w.posts[-1] in called or time.monotonic() > held + 1.5, "a call that must not be")
    assert set(called).isdisjoint(w.posts)
    assert (await two.run("release", "--all"))[0] == 0
    for mail_id in made:
        assert (await w.reply(f"{mail_id}-1"))["X-Fax-Outcome"] == "delivered"
    await pair.settled()


async def test_a_gateway_that_hears_no_news_looks_by_itself(pair: Pair, tmp_path: Path) -> None:
    """Where a NOTIFY is lost, a fax that another gateway accepted is called all the same."""
    w, number = pair.w, next(FREE)
    w.on_step = None
    settings = copy.deepcopy(w.gateway.settings)
    settings["smtp"]["listen"] = settings["http"]["listen"] = "127.0.0.1:0"
    deaf = Gateway(tmp_path, settings, DEAF, {"STATE_DIRECTORY": str(tmp_path), "PYTHONPATH": HERE})
    assert (await w.gateway.run("hold", "--all"))[0] == 0
    await deaf.start()
    try:
        fax = f"{await w.mail(number)}-1"
        w.carrier.set_webhook_url(deaf.webhook_url)
        with frozen(w.gateway), frozen(pair.two):
            assert (await deaf.run("release", "--all"))[0] == 0
            assert (await w.reply(fax))["X-Fax-Outcome"] == "delivered"
    finally:
        await deaf.close()
    assert deaf.said("call_taken", fax=fax)
    await pair.settled()


async def test_the_same_mail_at_both_gateways_at_once(pair: Pair) -> None:
    """A mail that its client handed to both at the same moment is one fax, and both answer with its id."""
    w = pair.w
    w.on_step = None
    for _ in range(5):
        number = next(FREE)
        message = letter(number)
        ids = await asyncio.gather(
            *(w.mail(number, message=message, gateway=one) for one in pair.gateways for _ in range(2))
        )
        assert len(set(ids)) == 1
        assert (await w.reply(f"{ids[0]}-1"))["X-Fax-Outcome"] == "delivered"
        assert w.posts.count(number) == len(w.taken(number)) == 1
    await pair.settled()
