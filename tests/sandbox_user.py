"""Someone who uses the sandbox: an HTTP client, and a webhook receiver built from the documentation alone."""

import base64
import io
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pikepdf
from aiohttp import web
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from yarl import URL

from gateway.sandbox import Sandbox, SandboxOptions
from gateway.sandbox_script import NUMBERS

FROM = "+13125790015"
APPLICATION = "1232154810234"
FOUR = ["fax.queued", "fax.media.processed", "fax.sending.started", "fax.delivered"]

Fields = dict[str, str | None]


def pdf(pages: int = 1) -> bytes:
    """Make a document of blank pages."""
    document = pikepdf.new()
    for _ in range(pages):
        document.add_blank_page()
    written = io.BytesIO()
    document.save(written)
    return written.getvalue()


PDF = pdf()


class Receiver:
    """A webhook receiver that knows only what the documentation says of signatures and envelopes."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.public_key = ""
        self.statuses: list[int] = []
        self.refuse_forgeries = False

    async def hook(self, request: web.Request) -> web.Response:
        """Judge and keep one event."""
        body = await request.read()
        stamp = request.headers["telnyx-timestamp"]
        key = Ed25519PublicKey.from_public_bytes(base64.b64decode(self.public_key))
        told = json.loads(body)
        event = dict(told.get("data", told)) | {
            "enveloped": "data" in told,
            "meta": told.get("meta"),
            "age": 0,
        }
        event["age"] = time.time() - int(stamp)
        try:
            key.verify(
                base64.b64decode(request.headers["telnyx-signature-ed25519"]), f"{stamp}|".encode() + body
            )
            event["genuine"] = True
        except InvalidSignature:
            event["genuine"] = False
        self.events.append(event)
        if self.refuse_forgeries and not event["genuine"]:
            return web.Response(status=401)
        status = self.statuses.pop(0) if self.statuses else 200
        return web.Response(status=status, headers={"Location": "/hook"} if status == 302 else {})

    def types(self) -> list[str]:
        """List the event types in order of arrival."""
        return [event["event_type"] for event in self.events]


class User:
    """Someone who uses the API: a sandbox, a receiver for its webhooks, and an HTTP client with the key."""

    def __init__(self, sandbox: Sandbox, http: aiohttp.ClientSession, receiver: Receiver) -> None:
        self.sandbox = sandbox
        self.http = http
        self.receiver = receiver

    async def ask(self, method: str, path: str, **more: Any) -> tuple[int, Any]:
        """Send a request under `/v2` (or to `/sandbox`); return status and JSON, None for an empty body."""
        base = self.sandbox.url.removesuffix("/v2") if path.startswith("/sandbox") else self.sandbox.url
        async with self.http.request(method, URL(base + path, encoded=True), **more) as response:
            return response.status, await response.json() if await response.read() else None

    async def post(
        self, to: str, document: bytes = PDF, changes: Fields | None = None
    ) -> aiohttp.ClientResponse:
        """Send a fax and read the whole answer; a changed field set to None is left out."""
        response = await self.start(to, document, changes)
        await response.read()
        return response

    async def start(
        self, to: str, document: bytes = PDF, changes: Fields | None = None
    ) -> aiohttp.ClientResponse:
        """Send a fax and read no more than the head of the answer."""
        fields: Fields = {"connection_id": APPLICATION, "to": to, "from": FROM}
        fields |= changes or {}
        form = aiohttp.FormData()
        for name, value in fields.items():
            if value is not None:
                form.add_field(name, value)
        file = io.BytesIO(document)
        form.add_field("contents", file, filename="fax.pdf", content_type="application/pdf")
        return await self.http.post(f"{self.sandbox.url}/faxes", data=form, allow_redirects=False)

    async def send(self, to: str, document: bytes = PDF, changes: Fields | None = None) -> dict[str, Any]:
        """Send a fax that must be accepted; return its object."""
        response = await self.post(to, document, changes)
        assert response.status == 202, await response.text()
        return dict((await response.json())["data"])

    async def show(self, fax_id: str) -> dict[str, Any]:
        """Ask for one fax."""
        status, body = await self.ask("GET", f"/faxes/{fax_id}")
        assert status == 200
        return dict(body["data"])

    async def listed(self, query: str = "") -> list[str]:
        """Ask the list, the query as it is written; return ids."""
        status, body = await self.ask("GET", f"/faxes?{query}")
        assert status == 200
        return [row["id"] for row in body["data"]]

    async def ended(self, to: str, document: bytes = PDF) -> tuple[str, str | None]:
        """Send a fax and wait for the webhook of its end; return status and reason."""
        seen = len(self.receiver.events)
        await self.send(to, document)
        await self.sandbox.until(lambda: any(is_end(kind) for kind in self.receiver.types()[seen:]))
        payload = self.receiver.events[-1]["payload"]
        return payload["status"], payload.get("failure_reason")


def is_end(event_type: str) -> bool:
    """Tell whether an event ends a fax."""
    return event_type in ("fax.delivered", "fax.failed")


@asynccontextmanager
async def running(**options: Any) -> AsyncIterator[User]:
    """Run a sandbox, calls at once unless told otherwise, with receiver and client."""
    receiver = Receiver()
    app = web.Application()
    app.router.add_post("/hook", receiver.hook)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    clock = options.pop("clock", time.time)
    settings: dict[str, Any] = {
        "call_time": 0.0,
        "webhook_url": f"http://127.0.0.1:{runner.addresses[0][1]}/hook",
    }
    sandbox = Sandbox(SandboxOptions(**settings | options), clock=clock)
    receiver.public_key = sandbox.public_key
    await sandbox.start()
    try:
        async with aiohttp.ClientSession(headers={"Authorization": "Bearer sandbox-key"}) as http:
            yield User(sandbox, http, receiver)
    finally:
        await sandbox.close()
        await runner.cleanup()


def number_of(*names: str) -> str:
    """Look up the number that does this."""
    return next(number for number, row in NUMBERS.items() if row == names)
