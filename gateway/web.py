"""HTTP in: the carrier's events, health, metrics.

In charge of: what each request is answered.

Promises: 200 to an event only after it is durable; a forged one changes nothing; everything that is not ours
to use is acknowledged, so that the carrier stops, and counted. `/readyz` stays 200 during a hold: a balancer
would cut mail and webhooks just then.

Fails: 503 when the store is away, so that the carrier repeats.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from gateway.carrier import Carrier, CarrierEvent, Forged, Malformed
from gateway.database import StoreError
from gateway.log import get_logger
from gateway.metrics import CONTENT_TYPE, Metrics, Queue
from gateway.store import Store
from gateway.store_desk import Counts

LARGEST_EVENT = 256 * 1024  # octets; the carrier's are below 2 KB
BODY_LIMIT = 10.0  # seconds for a body to arrive: the carrier gives up after 2
CONNECTION_LIMIT = 60.0  # seconds after which a connection ends, once its request is answered
MOST_CONNECTIONS = 500
KEEPALIVE = 15.0  # seconds that a connection may wait for its next request
_NAME = "fax"

log = get_logger()


class Doorway:
    """The handlers over one store and one carrier."""

    def __init__(
        self,
        store: Store,
        carrier: Carrier,
        *,
        connection_id: str,
        webhooks: bool,
        clock: Callable[[], float],
        metrics: Metrics,
        ready: Callable[[], bool],
    ) -> None:
        """`webhooks`: whether a public key is configured; without one that door is shut."""
        self._store = store
        self._carrier = carrier
        self._connection_id = connection_id
        self._webhooks = webhooks
        self._clock = clock
        self._metrics = metrics
        self._ready = ready

    def application(self, webhook_path: str) -> web.Application:
        """Return the routes."""
        app = web.Application(client_max_size=LARGEST_EVENT)
        app.router.add_get("/healthz", self.health)
        app.router.add_get("/readyz", self.readiness)
        app.router.add_get("/metrics", self.scrape)
        if self._webhooks:
            app.router.add_post(webhook_path, self.webhook)
        app.on_response_prepare.append(_say_little)
        return app

    # --- the carrier's events -----------------------------------------------------------------------------

    async def webhook(self, request: web.Request) -> web.Response:
        """Take one event."""
        try:
            async with asyncio.timeout(BODY_LIMIT):
                body = await request.read()
        except TimeoutError:
            return self._refuse(request, 408, "malformed", "the body did not arrive")
        except web.HTTPRequestEntityTooLarge:
            return self._refuse(request, 413, "malformed", "too large")
        try:
            event = self._carrier.read_event(request.headers, body, self._clock())
        except Forged as error:
            return self._refuse(request, 401, "forged", error.cause)
        except Malformed as error:
            return self._refuse(request, 400, "malformed", error.cause)
        return await self._keep(event)

    def _refuse(self, request: web.Request, status: int, result: str, cause: str) -> web.Response:
        self._metrics.webhook("forged" if result == "forged" else "malformed")
        log.warning("webhook_refused", peer=request.remote, answer=status, cause=cause)
        return web.Response(status=status)

    async def _keep(self, event: CarrierEvent) -> web.Response:
        seen = event.sighting
        about = {"event_id": event.id, "type": event.type, "carrier_id": seen.carrier_id}
        if not event.outbound or seen.connection_id != self._connection_id:
            self._metrics.webhook("ignored")
            log.info(
                "webhook_ignored", cause="inbound" if not event.outbound else "another application", **about
            )
            return web.Response()
        try:
            fate, fax_id = await self._store.remember_event(event)
        except StoreError as error:
            self._metrics.webhook("failed")
            log.warning("store_failed", verb="remember_event", error=str(error))
            return web.Response(status=503, headers={"Retry-After": "5"})
        self._metrics.webhook(fate.value)
        log.info("webhook_received", fax=fax_id, result=fate.value, **about)
        return web.Response()

    # --- for monitors -------------------------------------------------------------------------------------

    async def health(self, _request: web.Request) -> web.Response:
        """Answer: the loop lives."""
        return web.json_response({"status": "ok"})

    async def readiness(self, _request: web.Request) -> web.Response:
        """Answer whether mail is taken; a hold is told in the body."""
        return await self._counted(self._readiness)

    async def _readiness(self, counts: Counts) -> web.Response:
        holds = [{"kind": brake.kind, "cause": brake.cause} for brake in counts.brakes]
        ready = self._ready()
        body = {"status": "ready" if ready else "not taking mail", "holds": holds, "overdue": counts.overdue}
        return web.json_response(body, status=200 if ready else 503)

    async def scrape(self, _request: web.Request) -> web.Response:
        """Answer Prometheus."""
        return await self._counted(self._scrape)

    async def _scrape(self, counts: Counts) -> web.Response:
        waiting = {state: counts.states.get(state, 0) for state in counts.states}
        self._metrics.show(
            Queue(
                waiting=waiting,  # type: ignore[arg-type]  # the store's states are the metric's
                overdue=counts.overdue,
                oldest_waiting=counts.oldest_waiting,
                on_hold=any(brake.kind != "pause" for brake in counts.brakes),
                outbox=counts.outbox,
                parked=counts.parked,
            )
        )
        return web.Response(body=self._metrics.render(), headers={"Content-Type": CONTENT_TYPE})

    async def _counted(self, answer: Callable[[Counts], Awaitable[web.Response]]) -> web.Response:
        try:
            counts = await self._store.count()
        except StoreError as error:
            log.warning("store_failed", verb="count", error=str(error))
            return web.json_response({"status": "the store does not answer"}, status=503)
        return await answer(counts)


async def _say_little(_request: web.Request, response: web.StreamResponse) -> None:
    """Keep names and versions of ours out of answers to strangers."""
    response.headers["Server"] = _NAME


def connection_factory(server: web.Server) -> Callable[[], asyncio.Protocol]:
    """Return what `loop.create_server` calls for each connection: aiohttp itself sets no limits on them.

    A peer that only connects, or sends its headers a byte a second, is cut off (CWE-400).
    """

    def make() -> asyncio.Protocol:
        if len(server.connections) >= MOST_CONNECTIONS:
            return _Closed()
        loop = asyncio.get_running_loop()
        # Not unpacked: aiohttp would go on inflating a refused body, on the loop (CWE-409).
        how: dict[str, Any] = {"keepalive_timeout": KEEPALIVE, "auto_decompress": False, "access_log": None}
        handler = _Connection(server, loop=loop, **how)
        loop.call_later(CONNECTION_LIMIT, handler.close)
        return handler

    return make


class _Connection(web.RequestHandler):
    """aiohttp's conversation, discreet about what is no HTTP.

    aiohttp would answer that with its own and Python's version, and log its octets, which may be a document.
    """

    __slots__ = ()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        if isinstance(exc, HttpProcessingError):
            log.warning("webhook_refused", peer=request.remote, answer=status, cause="not HTTP")
        response = super().handle_error(request, status, exc, message)
        response.headers["Server"] = _NAME
        return response

    def log_exception(self, *args: object, **how: object) -> None:
        if not isinstance(how.get("exc_info"), HttpProcessingError):
            super().log_exception(*args, **how)


class _Closed(asyncio.Protocol):
    """One connection too many."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Close it."""
        transport.close()
