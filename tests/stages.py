"""The stages of a fax's way at which a test ends the gateway.

A stage is a context: entered once the moment is there, left to let the world move on, be the gateway dead by
then or about to stop.
"""

import asyncio
import contextlib
import email
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from email.message import EmailMessage

from crashes import Gate, Scene, locked, rows
from harness import letter, until
from papers import blank, saved
from pikepdf import Dictionary, Name

Stage = Callable[[Scene], AbstractAsyncContextManager[None]]


def large_letter(number: str) -> EmailMessage:
    """Make a mail with 3 MB that no compression makes smaller: more than the sockets' buffers take in."""
    with blank(1) as pdf:
        width, height = 1000, 1000
        picture = pdf.make_stream(
            secrets.token_bytes(width * height),
            {
                "/Type": Name.XObject, "/Subtype": Name.Image, "/Width": width, "/Height": height,
                "/ColorSpace": Name.DeviceGray, "/BitsPerComponent": 8,
            },
        )  # fmt: skip
        pdf.pages[0].obj.Resources.XObject = Dictionary(P=picture)
        document = saved(pdf)
    message = letter(number)
    message.clear_content()
    message.add_attachment(document, maintype="application", subtype="pdf", filename="large.pdf")
    return message


# --- mail in -------------------------------------------------------------------------------------------


@asynccontextmanager
async def amid_data(s: Scene) -> AsyncIterator[None]:
    """Wait until the client has sent half of its mail."""
    client = await s.client()
    half = len(s.data) // 2
    await client.send(s.data[:half])
    yield
    await client.send(s.data[half:])
    await s.hear(client)


@asynccontextmanager
async def after_final_dot(s: Scene) -> AsyncIterator[None]:
    """Wait until the gateway has the whole mail, and cannot commit it."""
    client = await s.client()
    with locked(s.store):
        await client.send(s.data)
        await until(lambda: any((s.store.parent / "incoming").iterdir()), "the mail to be examined")
        yield
    await s.hear(client)


@asynccontextmanager
async def amid_chunks(s: Scene) -> AsyncIterator[None]:
    """Wait until parts of a large document are in the store."""
    s.message = large_letter(*s.numbers)
    client = await s.client()
    sending = asyncio.create_task(client.send(s.data))
    count, before = (
        "SELECT count(*) FROM document_chunks",
        rows(s.store, "SELECT count(*) FROM document_chunks"),
    )
    await until(lambda: rows(s.store, count) != before, "a part of the document to be stored")
    yield
    await sending
    await s.hear(client)


@asynccontextmanager
async def before_250_arrives(s: Scene) -> AsyncIterator[None]:
    """Wait until the mail is committed; its client never hears of it."""
    client = await s.client()
    await client.send(s.data)
    await s.logged("mail_accepted")
    yield
    client.close()


@asynccontextmanager
async def after_250(s: Scene) -> AsyncIterator[None]:
    """Wait until the client is told 250."""
    await s.mail()
    yield


# --- the call ------------------------------------------------------------------------------------------


def at_carrier(step: str, *behaviours: str) -> Stage:
    """Return the stage where the POST of the fax has come as far as `step` of the sandbox."""

    @asynccontextmanager
    async def stage(s: Scene) -> AsyncIterator[None]:
        if behaviours:
            s.world.carrier.set_script({s.numbers[0]: behaviours})
        gate = s.hold(lambda name, told: name == step and told.get("method", "POST") == "POST")
        await s.mail()
        await gate.reached()
        yield
        gate.open()

    return stage


@asynccontextmanager
async def amid_post(s: Scene) -> AsyncIterator[None]:
    """Wait until the carrier has the headers and the first part of a large document."""
    s.message = large_letter(*s.numbers)
    async with at_carrier("request")(s):
        yield


@asynccontextmanager
async def before_202_is_recorded(s: Scene) -> AsyncIterator[None]:
    """Wait until the carrier's id has arrived, and cannot be written down."""
    gate = s.hold(lambda name, _told: name == "accepted")
    await s.mail()
    await gate.reached()
    with locked(s.store):
        gate.open()
        await s.logged("call_taken")
        yield


def before_webhook(event_type: str) -> Stage:
    """Return the stage where the call is under way and this event is the next to come."""

    @asynccontextmanager
    async def stage(s: Scene) -> AsyncIterator[None]:
        gate = s.hold(lambda name, told: name == "webhook" and told["event"]["event_type"] == event_type)
        await s.mail()
        await gate.reached()
        await s.in_state("sending")
        yield
        gate.open()

    return stage


@asynccontextmanager
async def webhooks_lost(s: Scene) -> AsyncIterator[None]:
    """Wait until a call is under way of which no event will ever tell."""
    s.world.carrier.set_script({s.numbers[0]: "webhooks-lost"})
    s.behaviours = ("webhooks-lost",)
    await s.mail()
    await s.in_state("sending")
    yield


@asynccontextmanager
async def before_200_arrives(s: Scene) -> AsyncIterator[None]:
    """Wait until the gateway has answered the final event; the carrier never hears it, and sends it again."""
    gate, gateway = Gate(), s.world.gateway

    async def wire(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer):
            request = await reader.readuntil(b"\r\n\r\n")
            length = email.message_from_bytes(request.partition(b"\r\n")[2])["Content-Length"]
            request += await reader.readexactly(int(length))
            inward, outward = await asyncio.open_connection("127.0.0.1", gateway.http_port)
            with contextlib.closing(outward):
                outward.write(request)
                answer = await inward.readuntil(b"\r\n\r\n")
            if b'"fax.delivered"' in request:
                assert answer.startswith(b"HTTP/1.1 200")
                return await gate.hold()
            return writer.write(answer)

    async with await asyncio.start_server(wire, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        s.world.carrier.set_webhook_url(f"http://127.0.0.1:{port}/webhooks/telnyx")
        await s.mail()
        await gate.reached()
        yield
        s.world.carrier.set_webhook_url(gateway.webhook_url)
        gate.open()
        lost = lambda: s.world.carrier.events[-1].status is None  # noqa: E731
        await until(lost, "the carrier to miss the answer")


# --- the reply -----------------------------------------------------------------------------------------


def at_relay(moment: str) -> Stage:
    """Return the stage where the reply has come as far as this moment of the relay."""

    @asynccontextmanager
    async def stage(s: Scene) -> AsyncIterator[None]:
        gate = s.relay.gates[moment] = Gate()
        await s.mail()
        await gate.reached()
        yield
        gate.open()

    return stage


@asynccontextmanager
async def before_reply_is_recorded(s: Scene) -> AsyncIterator[None]:
    """Wait until the relay has taken the reply, and that cannot be written down."""
    gate = s.relay.gates["dot"] = Gate()
    await s.mail()
    await gate.reached()
    with locked(s.store):
        gate.open()
        await s.logged("reply_sent")
        yield


# --- waiting -------------------------------------------------------------------------------------------


@asynccontextmanager
async def awaiting_retry(s: Scene) -> AsyncIterator[None]:
    """Wait until a busy line is to be called again a little later."""
    s.behaviours = ("user_busy", "delivered")
    s.world.carrier.set_script({s.numbers[0]: s.behaviours})
    await s.mail()
    await s.logged("fax_requeued", reason="user_busy")
    yield


def in_doubt(behaviour: str, *in_the_end: str) -> Stage:
    """Return the stage where the answer to a POST is missing."""

    @asynccontextmanager
    async def stage(s: Scene) -> AsyncIterator[None]:
        s.behaviours = in_the_end
        s.world.carrier.set_script({s.numbers[0]: (behaviour, "delivered")})
        gate = s.hold(lambda name, _told: name == "webhook")
        await s.mail()
        await s.logged("call_in_doubt")
        yield
        gate.open()

    return stage


@asynccontextmanager
async def on_hold(s: Scene) -> AsyncIterator[None]:
    """Wait until the account is out of funds; whoever pays says `release --all`."""
    s.alerts = frozenset({"account_held"})
    s.world.carrier.set_account("402")
    await s.mail()
    await s.logged("account_held")
    yield
    s.world.carrier.set_account("ok")
    s.afterwards = lambda: s.world.gateway.run("release", "--all")
