"""SIGTERM at every stage of a fax's way: what was begun is finished, and a restart goes on with the rest."""

import asyncio
import contextlib
import os
import re
import socket
import sqlite3
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from signal import SIGTERM

import crashes
import pytest
import pytest_asyncio
import stages
from crashes import Client, Gate, Scene, Theatre, rows
from faxes import RULES
from harness import PATIENCE, QUICK, Gateway, until
from shims import shim
from smtp_peers import Taker
from stages import Stage, at_carrier, at_relay, before_webhook, in_doubt
from stores import SETTINGS, TriedStore

from gateway.bell import Bell
from gateway.dispatch import Dispatcher
from gateway.metrics import Metrics
from gateway.records import Fax, State
from gateway.sandbox import Sandbox, SandboxOptions
from gateway.smtp_session import Sessions, SmtpSession
from gateway.store_work import CallSettings
from gateway.telnyx import Telnyx

pytestmark = pytest.mark.asyncio(loop_scope="module")

MAIL_IN: dict[str, Stage] = {
    "while DATA is being received": stages.amid_data,
    "after the final dot, before the commit": stages.after_final_dot,
    "while a large document is being stored": stages.amid_chunks,
}
CALL: dict[str, Stage] = {
    "when the headers of the POST have arrived": at_carrier("request"),
    "in the middle of a large POST": stages.amid_post,
    "after acceptance, before the 202": at_carrier("accepted"),
    "after the 202, before it is recorded": stages.before_202_is_recorded,
}
REPLY: dict[str, Stage] = {
    "when the relay is about to take the reply": at_relay("rcpt"),
    "in the middle of the reply's DATA": at_relay("data"),
    "when the relay has the reply, before its 250": at_relay("dot"),
    "after the relay's 250, before it is recorded": stages.before_reply_is_recorded,
}
REST: dict[str, Stage] = {
    "right after the 250": stages.after_250,
    "between two webhooks": before_webhook("fax.sending.started"),
    "while the fax waits for a retry": stages.awaiting_retry,
    "while it is in doubt": in_doubt("answer-lost", "answer-lost"),
    "while the account is on hold": stages.on_hold,
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def theatre(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Theatre]:
    """Open the theatre that all stages share, so that each costs one start only."""
    async with crashes.theatre(tmp_path_factory.mktemp("stop"), retries={"busy": ["1s"]}) as opened:
        yield opened


@pytest.mark.parametrize("name", MAIL_IN)
async def test_a_mail_that_was_begun_is_taken_in_before_the_stop(theatre: Theatre, name: str) -> None:
    """A client that is sending its mail when the gateway is told to stop still gets its 250."""
    async with theatre.scene() as s:
        async with MAIL_IN[name](s):
            await s.terminate()
        assert await s.stopped() == 0
        assert s.told
        s.calm()
        await s.restart()
        await s.check()


@pytest.mark.parametrize("name", CALL)
async def test_an_open_post_is_awaited_and_recorded_before_the_stop(theatre: Theatre, name: str) -> None:
    """A call whose answer is on its way when the gateway is told to stop is never in doubt."""
    async with theatre.scene() as s:
        async with CALL[name](s):
            await s.terminate()
        assert await s.stopped() == 0
        assert rows(s.store, "SELECT state FROM faxes WHERE ended_at IS NULL") in ([], [("sending",)])
        s.calm()
        await s.restart()
        assert not s.world.gateway.said("call_in_doubt")
        await s.check()


@pytest.mark.parametrize("name", REPLY)
async def test_a_reply_on_its_way_arrives_once_before_the_stop(theatre: Theatre, name: str) -> None:
    """A reply that is being handed over when the gateway is told to stop comes once, not again later."""
    async with theatre.scene() as s:
        before = len(s.relay.mails)
        async with REPLY[name](s):
            await s.terminate()
        assert await s.stopped() == 0
        assert s.finals() == [(f"{s.told}-1", "delivered")]
        s.calm()
        await s.restart()
        await s.check()
        assert len(s.relay.mails) == before + 1


@pytest.mark.parametrize("name", REST)
async def test_a_gateway_stopped_at_any_other_stage_goes_on_after_its_restart(
    theatre: Theatre, name: str
) -> None:
    """Whatever a fax waits for when the gateway stops, it is sent and answered once after the restart."""
    async with theatre.scene(mails_to=3 if name == "right after the 250" else 1) as s:
        async with REST[name](s):
            await s.terminate()
            assert await s.stopped() == 0
            s.calm()
        await s.restart()
        await s.check()


async def test_during_a_stop_clients_are_sent_away_and_may_come_again(theatre: Theatre) -> None:
    """While an open call keeps the gateway from ending, old and new connections are told 421."""
    async with theatre.scene() as s:
        port = s.world.gateway.smtp_port
        idle = await Client.connect(port)
        assert (await idle.answer()).startswith("220 ")
        async with at_carrier("accepted")(s):
            await s.terminate()
            for client in (idle, await Client.connect(port)):
                assert await client.answer() == "421 4.3.2 shutting down, try again later"
                assert await client.answer() == ""
                client.close()
        assert await s.stopped() == 0
        await s.restart()
        await s.check()


async def test_a_client_that_dawdles_in_data_does_not_keep_the_gateway_from_stopping(tmp_path: Path) -> None:
    """A mail that has not come to its end after the time for that is sent away with 421, not cut off."""
    sessions, mails = Sessions(10, 10), Taker(tmp_path)
    factory = partial(SmtpSession, mails, sessions, size_limit=1000, hostname="fax.local", timeout=60.0)
    server = await asyncio.get_running_loop().create_server(factory, "127.0.0.1", 0)
    async with server:
        client = await Client.connect(server.sockets[0].getsockname()[1])
        await client.begin("+13125561000")
        await client.send(b"Subject: half a mail\r\n")
        await sessions.finish(0.05)
        assert await client.answer() == "421 4.3.2 shutting down, try again later"
        assert await client.answer() == ""
        client.close()
    assert mails.taken == []


async def test_events_that_come_during_a_stop_are_recorded(theatre: Theatre) -> None:
    """While an open call keeps the gateway from ending, it still takes events, and needs no second one."""
    async with theatre.scene(mails_to=2) as s:
        first, second = s.numbers
        event = s.hold(lambda name, told: name == "webhook" and told["event"]["event_type"] == "fax.delivered"
                       and told["event"]["payload"]["to"] == first)  # fmt: skip
        post = s.hold(lambda name, told: name == "accepted" and told["to"] == second)
        await s.mail()
        await event.reached()
        await post.reached()
        await s.terminate(carrier_waits=False)
        event.open()
        await s.logged("webhook_received", type="fax.delivered", result="applied")
        post.open()
        assert await s.stopped() == 0
        assert (f"{s.told}-1", "delivered") in rows(s.store, "SELECT id, state FROM faxes")
        s.calm()
        await s.restart()
        await s.check()


async def test_a_second_sigterm_ends_the_gateway_at_once_and_loses_nothing(theatre: Theatre) -> None:
    """Who does not want to wait for an open call tells the gateway again; the next start finds the call."""
    async with theatre.scene() as s:
        async with at_carrier("accepted")(s):
            await s.terminate()
            os.kill(s.world.gateway.pid, SIGTERM)
            assert await s.stopped() == 1
        await s.restart()
        assert s.world.gateway.said("call_in_doubt", faxes=1)
        await s.check()


async def test_a_gateway_told_to_stop_while_it_starts_ends_in_good_order(theatre: Theatre) -> None:
    """SIGTERM in the middle of the start is no crash, and the fax that was waiting goes out next time."""
    async with theatre.scene() as s:
        async with stages.awaiting_retry(s):
            await s.terminate()
            assert await s.stopped() == 0
        assert await s.end_starting(SIGTERM, lambda: s.world.gateway.said("started")) == 0
        s.calm()
        await s.restart()
        await s.check()


async def test_an_intent_written_as_the_stop_begins_is_still_carried_out(tmp_path: Path) -> None:
    """A fax that is just being claimed when the gateway is told to stop is called, not left in doubt."""
    gate = Gate()

    class SlowStore(TriedStore):
        async def claim_call(self, settings: CallSettings) -> Fax | None:
            fax = await super().claim_call(settings)
            await gate.hold()
            return fax

    sandbox = Sandbox(SandboxOptions(call_time=60.0))
    await sandbox.start()
    store = SlowStore(f"sqlite:///{tmp_path}/gateway.db")
    carrier = Telnyx(
        api_base=sandbox.url, api_key="sandbox-key", connection_id=sandbox.options.connection_id,
        public_key="", monochrome=False, version="test",
    )  # fmt: skip
    settings = replace(SETTINGS, connection_id=sandbox.options.connection_id)
    async with carrier:
        fax = await store.queued()
        dispatcher = Dispatcher(
            store, carrier, settings=settings, rules=RULES, metrics=Metrics(), keep_documents=1.0,
            keep_records=1.0,
            longest_post=0.0,
        )  # fmt: skip
        loop = asyncio.create_task(dispatcher.run_calls(Bell().listener()))
        await gate.reached()
        drained = asyncio.create_task(dispatcher.drain(PATIENCE))
        gate.open()
        await drained
        loop.cancel()
        assert (await store.fax(fax.id)).state is State.SENDING
    await store.close()
    await sandbox.close()


# --- starting ------------------------------------------------------------------------------------------


async def test_a_second_gateway_on_the_same_database_is_refused(theatre: Theatre) -> None:
    """Another `serve` on a database in use says so with exit code 78, and the first one goes on unharmed."""
    async with theatre.scene() as s:
        code, _, errors = await s.world.gateway.run("serve")
        assert code == 78
        assert "store.url: another `fax-gateway serve` uses the database" in errors
        await s.check()


async def test_a_database_of_a_newer_program_is_refused_and_left_alone(theatre: Theatre) -> None:
    """After a downgrade, `serve` says which program is needed with exit code 78, and changes nothing."""
    async with theatre.scene() as s:
        assert await s.world.gateway.stop() == 0
        [(revision,)] = rows(s.store, "SELECT version_num FROM alembic_version")
        _write(s.store, "UPDATE alembic_version SET version_num = '9999'")
        code, _, errors = await s.world.gateway.run("serve")
        assert code == 78
        assert "written by a newer fax-gateway (revision 9999): upgrade the program" in errors
        _write(s.store, f"UPDATE alembic_version SET version_num = '{revision}'")  # noqa: S608 -- was read there
        await s.restart()
        await s.check()


def _write(database: Path, statement: str) -> None:
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as connection:
        connection.execute(statement)


async def test_a_start_that_finds_its_port_in_use_leaves_no_call_in_doubt(theatre: Theatre) -> None:
    """While something else has the mail port, `serve` ends with exit code 69 and has called nobody."""
    async with theatre.scene() as s:
        async with stages.awaiting_retry(s):
            await s.terminate()
            assert await s.stopped() == 0
        _write(s.store, "UPDATE faxes SET due_at = 0")
        post = s.hold(lambda name, told: name == "request" and told["method"] == "POST")
        with socket.create_server(("127.0.0.1", s.world.gateway.smtp_port)):
            code, _, errors = await s.world.gateway.run("serve")
        assert (code, "cannot start: " in errors) == (69, True)
        post.open()
        await s.restart()
        assert not s.world.gateway.said("call_in_doubt")
        await s.check()


SILENT_NAME_SERVER = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <netdb.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef int look_up(const char *, const char *, const struct addrinfo *, struct addrinfo **);

int getaddrinfo(const char *host, const char *port, const struct addrinfo *wanted, struct addrinfo **found) {
    while (host && strstr(host, ".invalid") && access(getenv("NAMES_SILENT"), F_OK) == 0)
        usleep(10000);
    return ((look_up *) dlsym(RTLD_NEXT, "getaddrinfo"))(host, port, wanted, found);
}
"""


@contextlib.asynccontextmanager
async def names_silent(
    s: Scene, folder: Path, monkeypatch: pytest.MonkeyPatch, *, relay: str
) -> AsyncIterator[Path]:
    """Start the gateway anew while nobody answers for the carrier's name; yield a file that keeps it so.

    Then as many calls as there are channels wait for that, and a mail is there for somebody in person.
    """
    library, silence = shim(folder, SILENT_NAME_SERVER), folder / "silence"
    silence.touch()
    gateway = s.world.gateway
    assert await gateway.stop() == 0
    environment = gateway._environment() | {"LD_PRELOAD": str(library), "NAMES_SILENT": str(silence)}
    with monkeypatch.context() as patch:
        patch.setattr(gateway, "_environment", lambda: environment)
        patch.setitem(gateway.settings["telnyx"], "api_base", "http://carrier.invalid/v2")
        patch.setitem(gateway.settings["replies"], "relay", relay)
        await gateway.start()
        await s.mail()
        await until(lambda: len(gateway.said("call_begun")) == 8, "as many calls as there are channels")
        human = await Client.connect(gateway.smtp_port)
        await human.begin("postmaster")
        await human.send(b"Subject: Does nothing work?\r\n\r\n.\r\n")
        assert (await human.answer()).startswith("250 2.0.0 queued as ")
        human.close()
        yield silence
        silence.unlink()
        await s.logged("call_unavailable")
        assert await gateway.stop() == 0
        s.calm()
    s.afterwards = lambda: gateway.run("release", "--all")
    await s.restart()
    await s.check()


async def test_mail_is_taken_while_relay_carrier_and_name_server_are_away(
    theatre: Theatre, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gateway started while nothing else works takes mail at once, and sends it in better days."""
    async with (
        theatre.scene(mails_to=9) as s,
        names_silent(s, tmp_path, monkeypatch, relay="smtp://relay.invalid:25") as silence,
    ):
        again = await s.client()
        await again.send(s.data)
        assert await again.answer() == f"250 2.0.0 queued as {s.told}"
        again.close()
        silence.unlink()
        await s.logged("reply_deferred")
        silence.touch()


async def test_mail_goes_out_while_nobody_answers_for_the_carriers_name(
    theatre: Theatre, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many calls wait for a name, the relay's is looked up at once."""
    async with theatre.scene(mails_to=9) as s:
        relay = s.world.gateway.settings["replies"]["relay"].replace("127.0.0.1", "localhost")
        async with names_silent(s, tmp_path, monkeypatch, relay=relay):
            await s.logged("reply_sent")


# --- systemd -------------------------------------------------------------------------------------------


class Supervised(Gateway):
    """A gateway that systemd started, as far as the environment says."""

    def _environment(self) -> dict[str, str]:
        told = {"NOTIFY_SOCKET": str(self.folder / "notify"), "WATCHDOG_USEC": "400000"}
        return super()._environment() | told


async def test_systemd_hears_when_the_gateway_is_ready_alive_and_stopping(tmp_path: Path) -> None:
    """The service manager is told READY once the doors listen, WATCHDOG in time, STOPPING at the end."""
    loop = asyncio.get_running_loop()
    store = {"store": {"url": f"sqlite:///{tmp_path}/gateway.db"}}
    gateway = Supervised(tmp_path, {name: dict(section) for name, section in (QUICK | store).items()})
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as manager:
        manager.bind(str(tmp_path / "notify"))

        async def told() -> list[str]:
            return (await asyncio.wait_for(loop.sock_recv(manager, 4096), PATIENCE)).decode().splitlines()

        try:
            start = asyncio.create_task(gateway.start())
            ready, status = await told()
            assert ready == "READY=1"
            doors = re.fullmatch(r"STATUS=mail on 127.0.0.1:(\d+), HTTP on 127.0.0.1:(\d+)", status)
            assert doors is not None
            for port in doors.groups():
                socket.create_connection(("127.0.0.1", int(port)), timeout=PATIENCE).close()
            assert [await told(), await told()] == [["WATCHDOG=1"], ["WATCHDOG=1"]]
            await start
            stop = asyncio.create_task(gateway.stop())
            while (word := (await told())[0]) == "WATCHDOG=1":
                pass
            assert word == "STOPPING=1"
            assert await stop == 0
        finally:
            await gateway.close()
