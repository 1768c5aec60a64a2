"""A carrier that hangs, resets, or answers rubbish, under a real daemon: no call is lost or made twice.

What test_way_doubt.py has is not repeated here: answers that are cut, 5xx after the fax was taken, a 202 with
HTML, without an id or with megabytes, lists that are empty or lag behind.
"""

import asyncio
import contextlib
import re
import socket
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import pytest_asyncio
from harness import World, letter, numbers, program_after, until, world
from papers import heavy
from ports import GONE
from yarl import URL

pytestmark = pytest.mark.asyncio(loop_scope="module")
FREE = numbers()
POST_LIMIT = 1.0  # seconds
CHECKS = {"doubt_checks": ["500ms", "1s"]}
PROGRAM = program_after(
    f"""
import short_leases
short_leases.POST_LIMIT, short_leases.CALL_LEASE = {POST_LIMIT}, {POST_LIMIT + 1.0}
short_leases.shorten()
"""
)
PAGE = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 13\r\n\r\n<html></html>"
EMPTY_202 = b"HTTP/1.1 202 Accepted\r\nContent-Length: 0\r\n\r\n"
HALF = b'HTTP/1.1 202 Accepted\r\nContent-Length: 900\r\n\r\n{"data": {"id": "'


@dataclass
class Wire:
    """The way from the gateway to the carrier, on which things happen to requests.

    `fault` happens to every request: "hang", "page" or "reset". `once` says what happens to the first POST
    to a number: "reset in the body", or "empty 202" and "half an answer" after the carrier took it.
    """

    carrier: URL
    fault: str = ""
    once: dict[str, str] = field(default_factory=dict)
    posts: list[str] = field(default_factory=list)  # the numbers of those that were begun
    _open: set[asyncio.StreamWriter] = field(default_factory=set)
    _server: asyncio.Server | None = None

    async def open(self) -> str:
        """Listen; return the address that stands for the carrier's."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return str(self.carrier.with_port(self._server.sockets[0].getsockname()[1]))

    def break_off(self, fault: str = "") -> None:
        """Let `fault` happen from now on, also to what goes over connections that stand."""
        self.fault = fault
        for writer in self._open:
            writer.transport.abort()

    async def close(self) -> None:
        """Cut everything."""
        self.break_off()
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            fault = self.fault
            if not fault and head.startswith(b"POST"):
                head += await reader.readuntil(b'name="from"')
                number = re.findall(rb"\+[0-9]+", head)[-1].decode()
                self.posts.append(number)
                fault = self.once.pop(number, "")
            await self._happen(fault, head, reader, writer)
        self._open.discard(writer)
        writer.close()

    async def _happen(
        self, fault: str, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        match fault:
            case "hang":
                await reader.read()  # until the gateway gives up
            case "page":
                writer.write(PAGE)
            case "reset" | "reset in the body":
                _reset(writer)
            case "empty 202" | "half an answer":
                inward, outward = await self._carrier(head)
                passing = asyncio.create_task(_pass(reader, outward))
                await inward.readuntil(b"\r\n\r\n")  # the carrier has it
                passing.cancel()
                outward.close()
                writer.write(EMPTY_202 if fault == "empty 202" else HALF)
                await writer.drain()
            case _:
                inward, outward = await self._carrier(head)
                await asyncio.gather(_pass(reader, outward), _pass(inward, writer))

    async def _carrier(self, head: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        assert self.carrier.host is not None
        inward, outward = await asyncio.open_connection(self.carrier.host, self.carrier.port)
        outward.write(head)
        return inward, outward


async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.closing(writer), contextlib.suppress(OSError, *GONE):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()


def _reset(writer: asyncio.StreamWriter) -> None:
    """End a connection by RST: not even what is on its way is taken."""
    end: socket.socket = writer.get_extra_info("socket")
    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


@dataclass
class Faulty:
    """A world whose gateway reaches the carrier over a wire."""

    w: World
    wire: Wire


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def faulty(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Faulty]:
    """One world for all tests of this file; at its end every fax has exactly one final reply."""
    environ = {"PYTHONPATH": str(Path(__file__).parent)}
    folder = tmp_path_factory.mktemp("carrier")
    async with world(folder, program=PROGRAM, environ=environ, telnyx=CHECKS) as w:
        wire = Wire(URL(w.carrier.url))
        w.gateway.settings["telnyx"]["api_base"] = await wire.open()
        await w.gateway.stop()
        await w.restart()
        await w.replies(next(FREE))  # a fax that the carrier knows and must list
        yield Faulty(w, wire)
        await w.everyone_told()
        await wire.close()


ONCE = ("reset in the body", "empty 202", "half an answer", "silence", "silence-after-acceptance")
NOT_TAKEN = {"reset in the body", "silence"}


async def test_a_carrier_that_fails_in_the_middle_of_a_post(faulty: Faulty) -> None:
    """Reset, silent, 202 without content, half an answer: doubted; called again only if it was not taken."""
    w, wire = faulty.w, faulty.wire
    called = {next(FREE): fault for fault in ONCE}
    silent = {number: fault for number, fault in called.items() if fault.startswith("silence")}
    w.carrier.set_script({number: [fault, "delivered"] for number, fault in silent.items()})
    wire.once = {number: fault for number, fault in called.items() if number not in silent}
    # More than the sockets take in: a reset comes while the document is being sent.
    replies = await w.replies(*called, message=letter(*called, document=heavy(6_000_000)))
    assert {(reply["X-Fax-Outcome"], reply["X-Fax-Attempts"]) for reply in replies} == {("delivered", "1")}
    for (number, fault), reply in zip(called.items(), replies, strict=True):
        assert w.gateway.said("call_in_doubt", fax=reply["X-Fax-Id"])
        assert len(w.taken(number)) == 1
        assert wire.posts.count(number) == (2 if fault in NOT_TAKEN else 1), fault


@pytest.mark.parametrize("fault", ["hang", "page", "reset"])
async def test_a_carrier_of_which_nothing_works(faulty: Faulty, fault: str) -> None:
    """While the API hangs, resets or answers a web page to everything, nothing is posted again; then once."""
    w, wire, number = faulty.w, faulty.wire, next(FREE)
    wire.break_off(fault)
    mail_id = await w.mail(number)
    unproved = {"fax": f"{mail_id}-1", "verdict": "Undecided"}
    await until(lambda: len(w.gateway.said("doubt_checked", **unproved)) > 1, "the last look")
    assert len(w.gateway.said("call_begun", fax=f"{mail_id}-1")) == 1
    wire.break_off()
    assert (await w.reply(f"{mail_id}-1"))["X-Fax-Outcome"] == "delivered"
    assert wire.posts.count(number) == w.posts.count(number) == len(w.taken(number)) == 1
