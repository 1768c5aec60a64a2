"""The sandbox: a stand-in for Telnyx's fax API over HTTP, with numbers that fail on purpose.

In charge of: the addresses under `/v2` that a fax client uses, the account's state, starting and stopping.
It shares no code with the gateway's client, so that one misreading of the API cannot hide in both.
Promises: a fax is in the ledger before its POST is answered; each POST that is taken is a fax of its own. All
is kept in memory and gone at the end.
Fails: a port not free raises `OSError`; a fault in a handler is answered 500 and logged by aiohttp.
"""

import asyncio
import base64
import math
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from email.utils import formatdate
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from gateway.sandbox_behaviours import BUSY_PAGE, NO_FUNDS, RETRY_AFTER, UNAUTHORIZED, Answer
from gateway.sandbox_calls import SandboxFax, timestamp
from gateway.sandbox_control import Control, RequestSeen
from gateway.sandbox_exchange import Envelope, Exchange, LedgerEntry, ListRules
from gateway.sandbox_requests import RequestError, check_form, error, not_found, read_form, read_list_query
from gateway.sandbox_script import Choices
from gateway.sandbox_webhooks import SentWebhook, WebhookSender

VOICE_PROFILE_ID = "1293384261075731499"
PADDING = 8_000_000
PAGE = "<html><head><title>{0}</title></head><body><center><h1>{0}</h1></center></body></html>\n"
ACCOUNT_STATES: Mapping[str, Answer | None] = {
    "ok": None,
    "401": UNAUTHORIZED,
    "402": NO_FUNDS,
    "429": RETRY_AFTER,
    "503": BUSY_PAGE,
}

OnStep = Callable[[str, dict[str, Any]], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class SandboxOptions:
    """How the sandbox behaves; times in seconds.

    `from_numbers` empty: any E.164 number may send. `call_time` lasts from acceptance to the end of a call,
    its webhooks spread over it; 0 is at once. `lag` is how long a slow answer takes and how long a hidden fax
    is missing from the list. `script` maps a number to behaviours in order of calls; `seed` draws for the
    numbers that neither the script nor the table knows.
    """

    host: str = "127.0.0.1"
    port: int = 0
    api_key: str = "sandbox-key"
    connection_id: str = "1232154810234"
    from_numbers: tuple[str, ...] = ()
    webhook_url: str | None = None
    signing_key: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)
    call_time: float = 1.0
    lag: float = 3.0
    seed: int | None = None
    script: Mapping[str, str | Sequence[str]] = field(default_factory=dict)
    envelope: Envelope = "both in turn"


class _ConnectionCut(Exception):
    """The answer is to cut the connection."""


class Sandbox:
    """The stand-in carrier: `start` it, use `url`, `close` it. It lives in the running event loop.

    `on_step` is awaited at "request" (headers are in), "body_read" (a POST's form is in), "accepted" (in the
    ledger, not answered), "answered" (or cut) and "webhook" (before each try), so that a test can act at that
    moment; `announce` gets a line of text for each thing that happened.
    """

    def __init__(
        self,
        options: SandboxOptions,
        *,
        clock: Callable[[], float] = time.time,
        on_step: OnStep | None = None,
        announce: Callable[[str], None] | None = None,
    ) -> None:
        self.options = options
        self.on_step = on_step
        self.requests: list[RequestSeen] = []
        self.events: list[SentWebhook] = []
        self._announce = announce or (lambda _line: None)
        self._clock = clock
        self._account = "ok"
        self._started_at = clock()
        self._changed = asyncio.Event()
        self._closing = asyncio.Event()
        self._choices = Choices(options.script, options.seed)
        self._webhooks = WebhookSender(
            options.webhook_url,
            options.signing_key,
            clock,
            lambda told: self._step("webhook", told),
            self._sent,
        )
        self._exchange = Exchange(
            self._choices,
            self._webhooks,
            clock,
            self._notify,
            call_time=options.call_time,
            lag=options.lag,
            envelope=options.envelope,
        )
        app = web.Application(middlewares=[self._front])
        app.add_routes(self._routes())
        app.add_routes(Control(self).routes())
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        self._port = options.port

    async def start(self) -> None:
        """Begin to listen. Raises `OSError` if the address cannot be had."""
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, self.options.host, self._port).start()
        except OSError:
            await self._runner.cleanup()
            raise
        await self._webhooks.start()
        self._port = self._runner.addresses[0][1]

    async def close(self) -> None:
        """Cut every call and every connection; nothing more is sent."""
        self._closing.set()
        await self._exchange.close()
        await self._runner.cleanup()
        await self._webhooks.close()

    @property
    def url(self) -> str:
        """The base address of the API, as `https://api.telnyx.com/v2` is Telnyx's."""
        host = f"[{self.options.host}]" if ":" in self.options.host else self.options.host
        return f"http://{host}:{self._port}/v2"

    @property
    def public_key(self) -> str:
        """The key that webhooks are checked with: Base64 of its 32 bytes."""
        return base64.b64encode(self.options.signing_key.public_key().public_bytes_raw()).decode()

    @property
    def ledger(self) -> list[LedgerEntry]:
        """Every fax that was taken, in order."""
        return self._exchange.ledger

    async def until(self, condition: Callable[[], bool], seconds: float = 10.0) -> None:
        """Wait until the condition holds, looking after each change here. Raises `TimeoutError`."""
        async with asyncio.timeout(seconds):
            while not condition():
                await self._changed.wait()

    def set_webhook_url(self, url: str | None) -> None:
        """Send webhooks to this address from the next try on; None sends none."""
        self._webhooks.url = url

    def set_script(self, script: Mapping[str, str | Sequence[str]]) -> None:
        """Replace the script. Raises `ScriptError`, and then the old one stays."""
        self._choices.replace_script(script)

    def set_account(self, state: str) -> None:
        """Break or mend the whole account. Raises `ValueError` if `state` is no key of `ACCOUNT_STATES`."""
        if state not in ACCOUNT_STATES:
            raise ValueError("state must be one of " + ", ".join(ACCOUNT_STATES))
        self._account = state

    def set_list(self, *, lag_seconds: float = 0.0, empty: bool = False) -> None:
        """Show each fax in the list only after so many seconds, or show none at all."""
        self._exchange.list_rules = ListRules(lag_seconds, empty)

    def _notify(self) -> None:
        self._changed.set()
        self._changed.clear()

    async def _step(self, name: str, told: dict[str, Any]) -> None:
        if self.on_step is not None:
            await self.on_step(name, told)

    def _sent(self, webhook: SentWebhook) -> None:
        self.events.append(webhook)
        self._announce(f"webhook {webhook.event_type} {webhook.fax_id}: {webhook.status or webhook.error}")
        self._notify()

    # Every request

    @web.middleware
    async def _front(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Log a request, hold it against account and key, and answer it or cut the connection."""
        if not request.path.startswith("/v2"):
            return await _guarded(request, handler)
        seen = RequestSeen(self._clock(), request.method, request.path, request.rel_url.raw_query_string)
        self.requests.append(seen)
        told = {"method": request.method, "path": request.path}
        await self._step("request", told)
        response: web.StreamResponse
        try:
            refused = self._refused(request)
            response = await (self._answer(refused, None) if refused else _guarded(request, handler))
            seen.status = response.status
            response.headers["Date"] = formatdate(self._clock(), usegmt=True)
            await response.prepare(request)
            await response.write_eof()
        except (_ConnectionCut, ConnectionError):  # by us, or by a client that left before the end
            if request.transport is not None:
                request.transport.abort()
            response = web.Response()
        self._announce(f"{request.method} {request.path}: {seen.status or 'cut'}")
        self._notify()
        await self._step("answered", told | {"status": seen.status})
        return response

    def _refused(self, request: web.Request) -> Answer | None:
        """Say how the state of the account or a wrong key answers every request; None lets it through."""
        answer = ACCOUNT_STATES[self._account]
        if answer is NO_FUNDS and (request.method, request.path) != ("POST", "/v2/faxes"):
            answer = None  # an empty account may still ask
        if answer is None and request.headers.get("Authorization") != f"Bearer {self.options.api_key}":
            return UNAUTHORIZED
        return answer

    async def _answer(self, answer: Answer, fax: SandboxFax | None) -> web.Response:
        """Make the answer a behaviour asks for. Raises `_ConnectionCut` where it is none."""
        if answer.late:
            await self._wait(self.options.lag)
        if answer.status is None:
            if answer.silent:
                await self._closing.wait()
            raise _ConnectionCut
        headers = dict(answer.headers)
        if answer.status == 307:  # noqa: PLR2004 - Temporary Redirect
            headers["Location"] = f"{self.url}/faxes"
        if answer.body == "page":
            text = PAGE.format(answer.status)
            return web.Response(status=answer.status, text=text, content_type="text/html", headers=headers)
        body: dict[str, Any] = {}
        if fax is None or answer.body == "error":
            body["errors"] = [error(answer.code, answer.title, answer.detail, pointer=answer.pointer)]
        else:
            if answer.body == "padded fax":
                body["padding"] = "x" * PADDING
            body["data"] = fax.as_json(self._webhooks.url)
            if answer.body == "fax without id":
                del body["data"]["id"]
        return web.json_response(body, status=answer.status, headers=headers)

    async def _wait(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self._closing.wait(), seconds)
        except TimeoutError:
            return

    # The API

    def _routes(self) -> list[web.RouteDef]:
        return [
            web.post("/v2/faxes", self._send_fax),
            web.get("/v2/faxes", self._list_faxes, allow_head=False),
            web.get("/v2/faxes/{id}", self._show_fax, allow_head=False),
            web.delete("/v2/faxes/{id}", self._delete_fax),
            web.post("/v2/faxes/{id}/actions/cancel", self._cancel_fax),
            web.get("/v2/fax_applications/{id}", self._show_application, allow_head=False),
            web.get("/v2/outbound_voice_profiles/{id}", self._show_voice_profile, allow_head=False),
        ]

    async def _send_fax(self, request: web.Request) -> web.StreamResponse:
        form = await read_form(request)
        await self._step("body_read", dict(form.texts))
        submission = check_form(form, self.options.connection_id, self.options.from_numbers)
        name, behaviour = self._exchange.choose(submission)
        fax = None
        if behaviour.answer.taken:
            fax = self._exchange.take(name, behaviour, submission)
            self._announce(f"fax {fax.id} from {fax.from_} to {fax.to}: {name}")
            await self._step("accepted", asdict(self.ledger[fax.order - 1]))
            call = self._exchange.begin(fax)
            if behaviour.webhooks.before_answer:
                await call
        return await self._answer(behaviour.answer, fax)

    async def _list_faxes(self, request: web.Request) -> web.Response:
        query = read_list_query(request.query)
        rows = self._exchange.listed(query)
        page = rows[(query.page - 1) * query.size : query.page * query.size]
        meta = {
            "page_number": query.page,
            "page_size": query.size,
            "total_pages": math.ceil(len(rows) / query.size),
            "total_results": len(rows),
        }
        data = [fax.as_json(self._webhooks.url) for fax in page]
        return web.json_response({"data": data, "meta": meta})

    def _fax(self, request: web.Request) -> SandboxFax:
        fax = self._exchange.faxes.get(request.match_info["id"])
        if fax is None:
            raise not_found()
        return fax

    async def _show_fax(self, request: web.Request) -> web.Response:
        return web.json_response({"data": self._fax(request).as_json(self._webhooks.url)})

    async def _delete_fax(self, request: web.Request) -> web.Response:
        del self._exchange.faxes[self._fax(request).id]
        return web.Response(status=204)

    async def _cancel_fax(self, request: web.Request) -> web.Response:
        fax = self._fax(request)
        if fax.outcome is not None:
            detail = "The fax is no longer queued, media.processed or sending."
            raise RequestError(422, error("90080", "Fax cannot be cancelled", detail))
        fax.cancel.set()
        return web.json_response({"data": {"result": "ok"}}, status=202)

    async def _show_application(self, request: web.Request) -> web.Response:
        if request.match_info["id"] != self.options.connection_id:
            raise not_found()
        data = {
            "id": self.options.connection_id,
            "record_type": "fax_application",
            "application_name": "Sandbox",
            "active": True,
            "anchorsite_override": "Latency",
            "webhook_event_url": self._webhooks.url,
            "webhook_event_failover_url": None,
            "webhook_timeout_secs": None,
            "inbound": {"channel_limit": None, "sip_subdomain": None},
            "outbound": {"channel_limit": None, "outbound_voice_profile_id": VOICE_PROFILE_ID},
            "tags": [],
            "created_at": timestamp(self._started_at),
            "updated_at": timestamp(self._started_at),
        }
        return web.json_response({"data": data})

    async def _show_voice_profile(self, request: web.Request) -> web.Response:
        if request.match_info["id"] != VOICE_PROFILE_ID:
            raise not_found()
        data = {
            "id": VOICE_PROFILE_ID,
            "record_type": "outbound_voice_profile",
            "name": "Sandbox",
            "enabled": True,
            "whitelisted_destinations": ["US", "CA"],
            "daily_spend_limit": None,
            "concurrent_call_limit": None,
        }
        return web.json_response({"data": data})


async def serve(options: SandboxOptions, announce: Callable[[str], None]) -> None:
    """Run a sandbox until cancelled, announcing in lines where it listens and each thing that happens.

    Raises `OSError` if the address cannot be had, `ScriptError` if the script cannot be used.
    """
    sandbox = Sandbox(options, announce=announce)
    await sandbox.start()
    try:
        announce(f"sandbox carrier at {sandbox.url}")
        announce(f"api_key = {options.api_key}, connection_id = {options.connection_id}")
        announce(f"public_key = {sandbox.public_key}")
        announce(f"webhooks to {options.webhook_url or 'nobody'}")
        await asyncio.Event().wait()
    finally:
        await sandbox.close()


async def _guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer a request, errors in Telnyx's shape."""
    try:
        return await handler(request)
    except RequestError as refusal:
        return refusal.response()
    except web.HTTPNotFound:
        return not_found().response()
    except web.HTTPMethodNotAllowed:
        detail = "The URL is valid, but the method is not allowed."
        return RequestError(405, error("10030", "Method not allowed", detail)).response()
