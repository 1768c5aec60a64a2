"""A server on loopback that records raw bytes and answers with raw bytes, for the tests of the carrier."""

import asyncio
import contextlib
import json
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from ports import GONE

from gateway.telnyx import Limits, Telnyx

FROM = "+13125550100"
TO = "+13125550123"
CONNECTION = "1494404757140276705"
FAX = "b8a1b1c6-1b5c-4d7e-9a43-0b6a3f6c2d11"
NOW = 1_767_651_826.0  # 2026-01-05T22:23:46Z


@dataclass
class Request:
    """One whole HTTP request, as it came."""

    method: str
    target: str
    headers: dict[str, str]
    head: bytes
    body: bytes

    @property
    def path(self) -> str:
        """The target without its query."""
        return urlsplit(self.target).path

    @property
    def query(self) -> dict[str, str]:
        """The query as a server reads it: a bare + is a space."""
        return dict(parse_qsl(urlsplit(self.target).query, keep_blank_values=True))


@dataclass
class Peer:
    """The server's end of one connection."""

    server: "RawServer"
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def request(self) -> Request | None:
        """Read one whole request and record it; None when the other side closes first."""
        try:
            head = await self.reader.readuntil(b"\r\n\r\n")
            line, *fields = head.decode().split("\r\n")
            headers = {name.lower(): value for name, _, value in (item.partition(": ") for item in fields)}
            body = await self.reader.readexactly(int(headers.get("content-length", "0")))
        except asyncio.IncompleteReadError as cut:
            self.server.stray += cut.partial
            return None
        method, target, _ = line.split(" ")
        got = Request(method, target, headers, head, body)
        self.server.requests.append(got)
        return got

    async def say(self, answer: bytes) -> None:
        """Send bytes."""
        self.writer.write(answer)
        await self.writer.drain()

    async def silence(self) -> None:
        """Say nothing until the other side has closed; whatever comes is stray."""
        while more := await self.reader.read(65536):
            self.server.stray += more

    def reset(self) -> None:
        """Cut the connection with a RST."""
        plug = self.writer.get_extra_info("socket")
        plug.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


Script = Callable[[Peer], Awaitable[None]]


@dataclass
class RawServer:
    """One script for each connection in turn, the last one for all that follow."""

    scripts: list[Script]
    scheme: str = "http"
    port: int = 0
    connections: int = 0
    requests: list[Request] = field(default_factory=list)
    stray: bytes = b""  # what came beside whole requests
    ended: asyncio.Event = field(default_factory=asyncio.Event)  # a connection is over
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    @property
    def base(self) -> str:
        """The address to give as `api_base`."""
        return f"{self.scheme}://127.0.0.1:{self.port}/v2"

    @property
    def request(self) -> Request:
        """The one request that came."""
        (only,) = self.requests
        return only

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Begin to serve a connection."""
        script = self.scripts[min(self.connections, len(self.scripts) - 1)]
        self.connections += 1
        self.tasks.append(asyncio.create_task(self.serve(script, Peer(self, reader, writer))))

    async def serve(self, script: Script, peer: Peer) -> None:
        """Serve one connection to its end."""
        try:
            with contextlib.suppress(*GONE):
                await script(peer)
        finally:
            peer.writer.close()
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                await peer.writer.wait_closed()
            self.ended.set()


@contextlib.asynccontextmanager
async def raw_server(*scripts: Script, tls: ssl.SSLContext | None = None) -> AsyncIterator[RawServer]:
    """Run the scripts on a free port."""
    server = RawServer(list(scripts), scheme="https" if tls else "http")
    listener = await asyncio.start_server(server.accept, "127.0.0.1", 0, ssl=tls)
    server.port = listener.sockets[0].getsockname()[1]
    try:
        yield server
    finally:
        listener.close()
        for task in server.tasks:
            task.cancel()
        ends = await asyncio.gather(*server.tasks, return_exceptions=True)
        faults = [end for end in ends if isinstance(end, Exception)]
        await listener.wait_closed()
        if faults:
            raise faults[0]


def reply(status: str, content: object = b"", *headers: str) -> bytes:
    """Return an HTTP answer; anything but bytes becomes JSON."""
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def answering(*answers: bytes) -> Script:
    """Return a script that gives these answers to a connection's requests, the last one for ever."""

    async def script(peer: Peer) -> None:
        turn = 0
        while await peer.request():
            await peer.say(answers[min(turn, len(answers) - 1)])
            turn += 1

    return script


def telnyx(base: str, **settings: Any) -> Telnyx:
    """Return the carrier under test, with test values for what a test does not care about."""
    settings.setdefault("limits", Limits(connect=5, post=5, question=5))
    values: dict[str, Any] = {
        "api_base": base,
        "api_key": "KEY0123456789",
        "connection_id": CONNECTION,
        "public_key": "",
        "monochrome": False,
        "version": "1.2.3",
        "clock": lambda: NOW,
    }
    return Telnyx(**(values | settings))
