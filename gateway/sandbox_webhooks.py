"""Webhooks of the sandbox carrier: envelope, signature, delivery.

In charge of: sending one event as Telnyx would, or as a behaviour wants it spoilt, and the log of each try.
Promises: every try is logged with the HTTP status it got; 3 tries, 200 and 400 ms apart, 2 s each; only 2xx
counts and no redirect is followed.
Fails: an event that no try could deliver is lost, as Telnyx's would be.

Signature (Telnyx, "Receiving webhooks"): Ed25519 over the text of the header `telnyx-timestamp`, `|`, and the
raw body; Base64 in the header `telnyx-signature-ed25519`.
"""

import asyncio
import base64
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import aiohttp
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from gateway.sandbox_behaviours import Webhooks

TRIES = 3
SPACING = 0.2
TIMEOUT = 2.0
STALE = 600
"""Age in seconds of a stale signature; Telnyx's own libraries allow 300."""


@dataclass(frozen=True, slots=True)
class SentWebhook:
    """One try to deliver an event: `status` is the receiver's answer, or None and `error` says why."""

    time: float
    fax_id: str
    event_id: str
    event_type: str
    attempt: int
    url: str
    enveloped: bool
    signed: str
    status: int | None
    error: str = ""


class WebhookSender:
    """Sends events to `url` (None: nowhere) once started.

    `before_each` is awaited before each try, `log` called after it.
    """

    def __init__(
        self,
        url: str | None,
        signing_key: Ed25519PrivateKey,
        clock: Callable[[], float],
        before_each: Callable[[dict[str, Any]], Awaitable[None]],
        log: Callable[[SentWebhook], None],
    ) -> None:
        self.url = url
        self._key = signing_key
        self._stranger = Ed25519PrivateKey.generate()
        self._clock = clock
        self._before_each = before_each
        self._log = log
        self._session: aiohttp.ClientSession | None = None

    async def start(self) -> None:
        """Open the client; each webhook gets a fresh connection, so that the receiver may restart."""
        connector = aiohttp.TCPConnector(force_close=True)
        self._session = aiohttp.ClientSession(
            connector=connector, timeout=aiohttp.ClientTimeout(total=TIMEOUT)
        )

    async def close(self) -> None:
        """Close the client."""
        if self._session is not None:
            await self._session.close()

    async def send(self, event: dict[str, Any], how: Webhooks, *, enveloped: bool) -> None:
        """Deliver one event, in as many copies as wanted, or give it up after the last try."""
        if how.signed == "forged first":
            await self._try(turned_round(event), "forged", 1, enveloped=enveloped)
        signed = "stale" if how.signed == "stale" else "truly"
        await asyncio.gather(*(self._deliver(event, signed, enveloped=enveloped) for _ in range(how.copies)))

    async def _deliver(self, event: dict[str, Any], signed: str, *, enveloped: bool) -> None:
        for attempt in range(1, TRIES + 1):
            if await self._try(event, signed, attempt, enveloped=enveloped):
                return
            if attempt < TRIES:
                await asyncio.sleep(SPACING * attempt)

    async def _try(self, event: dict[str, Any], signed: str, attempt: int, *, enveloped: bool) -> bool:
        """Send once and log it; tell whether a 2xx came back."""
        url, session = self.url, self._session
        if url is None or session is None:
            return True
        fax_id = event["payload"]["fax_id"]
        await self._before_each(
            {"fax_id": fax_id, "event": event, "attempt": attempt, "signed": signed, "url": url}
        )
        body = envelope(event, attempt, url) if enveloped else json.dumps(event).encode()
        now = self._clock()
        key = self._stranger if signed == "forged" else self._key
        headers = signature_headers(key, int(now) - (STALE if signed == "stale" else 0), body)
        status, error = await _post(session, url, body, headers)
        sent = SentWebhook(
            now, fax_id, event["id"], event["event_type"], attempt, url, enveloped, signed, status, error
        )
        self._log(sent)
        return status is not None and 200 <= status < 300  # noqa: PLR2004 - the class of success, RFC 9110 15.3


async def _post(
    session: aiohttp.ClientSession, url: str, body: bytes, headers: dict[str, str]
) -> tuple[int | None, str]:
    try:
        async with session.post(url, data=body, headers=headers, allow_redirects=False) as response:
            return response.status, ""
    except (aiohttp.ClientError, TimeoutError) as fault:
        return None, f"{type(fault).__name__}: {fault}"


def envelope(event: dict[str, Any], attempt: int, url: str) -> bytes:
    """Put an event into the `data`/`meta` form."""
    data = event | {"record_type": "event"}
    return json.dumps({"data": data, "meta": {"attempt": attempt, "delivered_to": url}}).encode()


def signature_headers(key: Ed25519PrivateKey, moment: int, body: bytes) -> dict[str, str]:
    """Sign a body for this Unix second; return every header of the webhook."""
    signature = key.sign(str(moment).encode() + b"|" + body)
    return {
        "Content-Type": "application/json",
        "User-Agent": "telnyx-webhooks",
        "telnyx-timestamp": str(moment),
        "telnyx-signature-ed25519": base64.b64encode(signature).decode(),
    }


def turned_round(event: dict[str, Any]) -> dict[str, Any]:
    """Tell the opposite of an end under the same event id; other events stay as they are."""
    payload = {name: value for name, value in event["payload"].items() if not name.endswith("failure_reason")}
    match event["event_type"]:
        case "fax.delivered":
            payload |= {"status": "failed", "failure_reason": "receiver_unallocated_number"}
            return event | {"event_type": "fax.failed", "payload": payload}
        case "fax.failed":
            payload |= {"status": "delivered", "page_count": 1, "call_duration_secs": 79}
            return event | {"event_type": "fax.delivered", "payload": payload}
    return event
