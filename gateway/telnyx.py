"""Telnyx's Programmable Fax API, version 2, over HTTP: the one carrier that is built in.

In charge of: the requests. What an answer means stands in `telnyx_answers`, webhooks in `telnyx_events`.

Promises:
- A POST of a fax is one request on one fresh connection. No layer repeats it, follows a redirect, or sends
  it through a proxy that the environment names: Telnyx has no idempotency key for faxes.
- `may_begin` is asked when the connection and its TLS stand and no byte of the request has left.
- `Unavailable` and `Refused` are said only when the fax was certainly not taken: before the first byte, or
  by a status that says so. Everything else is `InDoubt`.
- A list is complete, or it is not returned.

Fails: as `carrier` says; a cancelled task stops at once, and its connection is closed. Sources: "Send a Fax
via API" and the API reference of "Programmable Fax Commands" on developers.telnyx.com.
"""

import asyncio
import io
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any, Literal, Self
from urllib.parse import quote

import aiohttp
from aiohttp.connector import Connection
from aiohttp.payload import BytesIOPayload, Payload, StringPayload
from aiohttp.tracing import Trace
from yarl import URL

from gateway.carrier import Call, CarrierEvent, InDoubt, NotKnown, Unavailable
from gateway.doubt import Sighting
from gateway.records import Report
from gateway.telnyx_answers import (
    Answer,
    read_connection,
    read_count,
    read_date,
    read_fax_id,
    read_number,
    read_report,
    read_row,
    read_taken,
    read_text,
    stage_of,
    unanswered,
)
from gateway.telnyx_events import Webhooks

POST_LIMIT = 120.0
"""Seconds that `send` takes at most, from the look-up of the name to the last byte of the answer."""

_LONGEST_ANSWER = 64 * 1024  # bytes that are read of the answer to a POST
_LONGEST_LIST = 8 * 1024 * 1024  # and to a question: 250 faxes with their signed links are about 1 MB
_PAGE_SIZE = 250  # the most that Telnyx's other lists allow
_MOST_PAGES = 400

_NETWORK_ERRORS = (aiohttp.ClientError, TimeoutError, OSError)
# None of them is chained to ours: aiohttp's errors hold the request's headers, and so the key.


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds: for each try to connect (TLS included), for a whole POST of a fax, for a whole question."""

    connect: float = 10.0
    post: float = POST_LIMIT
    question: float = 20.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of `check --online`."""

    level: Literal["ok", "warning", "error"]
    text: str


class _OnePost(aiohttp.TCPConnector):
    """A connector for a single POST: asks `may_begin` when the connection stands, and remembers the yes."""

    def __init__(self, may_begin: Callable[[], bool]) -> None:
        super().__init__(force_close=True)
        self._may_begin = may_begin
        self.begun = False

    async def connect(
        self,
        req: aiohttp.ClientRequest,
        traces: list[Trace],
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109 -- the signature is aiohttp's
    ) -> Connection:
        """Connect. The request is written as soon as this returns."""
        standing = await super().connect(req, traces, timeout)
        if not self._may_begin():
            standing.close()
            raise Unavailable("lease ran out")
        self.begun = True
        return standing


class Telnyx:
    """The carrier that `carrier.Carrier` describes; an async context manager, which owns the connections."""

    def __init__(
        self,
        *,
        api_base: str,
        api_key: str,
        connection_id: str,
        public_key: str,
        monochrome: bool,
        version: str,
        clock: Callable[[], float] = time.time,
        limits: Limits | None = None,
    ) -> None:
        """Take the settings (`public_key` "" for none). Raises ValueError for one that cannot work."""
        base = URL(api_base)
        if base.scheme not in {"http", "https"} or not base.host:
            raise ValueError("the API's base address is not an http or https URL")
        if not re.fullmatch(r"[!-~]+", api_key):
            raise ValueError("the API key is empty, or cannot stand in an HTTP header")
        self._base = api_base.rstrip("/")
        self._connection_id = connection_id
        self._monochrome = monochrome
        self._clock = clock
        self._limits = limits or Limits()
        self._webhooks = Webhooks(public_key)
        self._headers = {
            "Authorization": f"Bearer {api_key}",
            "User-Agent": f"email-fax-gateway/{version}",
            "Accept": "application/json",
            "Accept-Encoding": "identity",
        }
        self._questions: aiohttp.ClientSession | None = None
        self._lead: float | None = None  # seconds that Telnyx's clock was ahead of ours at its last answer

    async def __aenter__(self) -> Self:
        """Open the session for questions, whose connections are kept alive."""
        self._questions = self._session(aiohttp.TCPConnector(), _ask_once)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Close it."""
        if self._questions is not None:
            await self._questions.close()
            self._questions = None

    # --- one fax -------------------------------------------------------------------------------------------

    async def send(self, call: Call, may_begin: Callable[[], bool]) -> str:
        """POST one fax; return its id. Raises Refused, Unavailable or InDoubt."""
        connector, answer = _OnePost(may_begin), Answer()
        try:
            async with asyncio.timeout(self._limits.post):
                await self._post("/faxes", self._form(call), connector, answer)
        except _NETWORK_ERRORS as error:
            if not connector.begun:
                raise Unavailable(f"no connection ({type(error).__name__})") from None
            if not answer.status:
                raise InDoubt(f"no answer ({type(error).__name__})") from None
        return read_taken(answer, self._clock())

    async def status(self, carrier_id: str) -> Report:
        """Ask about one fax. Raises NotKnown or Unavailable."""
        answer = await self._ask(f"/faxes/{quote(carrier_id, safe='')}")
        if answer.status == HTTPStatus.NOT_FOUND:
            raise NotKnown("HTTP 404")
        fax = self._content(answer).get("data")
        if not isinstance(fax, dict) or not (word := read_text(fax.get("status"))):
            raise Unavailable("answer holds no status")
        if read_fax_id(fax.get("id")) not in {None, carrier_id}:
            raise Unavailable("answer is about another fax")
        return read_report(stage_of(word), fax, asked=True)

    async def cancel(self, carrier_id: str) -> bool:
        """Ask to cancel; False when it is too late for that. Raises NotKnown or Unavailable."""
        connector, answer = _OnePost(lambda: True), Answer()
        try:
            async with asyncio.timeout(self._limits.question):
                await self._post(
                    f"/faxes/{quote(carrier_id, safe='')}/actions/cancel", None, connector, answer
                )
        except _NETWORK_ERRORS as error:
            if not answer.status:
                raise Unavailable(f"no answer ({type(error).__name__})") from None
        if answer.succeeded:
            return True
        if answer.status == HTTPStatus.UNPROCESSABLE_ENTITY:  # in no state for it (code 90080)
            return False
        if answer.status == HTTPStatus.NOT_FOUND:
            raise NotKnown("HTTP 404")
        raise unanswered(answer, self._clock())

    # --- the list ------------------------------------------------------------------------------------------

    async def sent_since(
        self, from_number: str, since: float, to_number: str | None = None
    ) -> list[Sighting]:
        """List every outbound fax from a number, all pages, created at or after `since`; or Unavailable.

        `since` is by Telnyx's clock; with `to_number`, only the faxes to that number are asked for.

        The order of the list is not documented. A fax that is taken while we read may push a row onto the
        next page, where it is met again; that as many were met as the first page promised shows that none
        was missed.
        """
        earliest = datetime.fromtimestamp(max(0, int(since)), UTC)
        query = {
            "filter[direction][eq]": "outbound",
            "filter[from][eq]": from_number,  # the + must go out as %2B: bare, it would be read as a space
            "filter[created_at][gte]": f"{earliest:%Y-%m-%dT%H:%M:%SZ}",
            "page[size]": str(_PAGE_SIZE),
        }
        if to_number is not None:
            query["filter[to][eq]"] = to_number
        met: dict[str, Sighting | None] = {}
        before: dict[str, Sighting | None] | None = None
        promised = 0
        for page in range(1, _MOST_PAGES + 1):
            rows, pages, total = self._page(
                await self._ask("/faxes", {**query, "page[number]": str(page)}), page
            )
            if rows == before or (not rows and page < pages):
                raise Unavailable("list repeats or skips a page")
            if page == 1:
                promised = total
            met |= rows
            before = rows
            if page >= pages:
                break
        else:
            raise Unavailable("list has too many pages")
        if len(met) < promised:
            raise Unavailable("list is incomplete")
        # An ignored filter shows in the rows; a row that is not ours proves nothing about ours.
        return [
            row for row in met.values() if row is not None and row.from_number == read_number(from_number)
        ]

    def _page(self, answer: Answer, page: int) -> tuple[dict[str, Sighting | None], int, int]:
        """Return a page's rows by id (None: not outbound), the number of pages, and of rows in the list."""
        content = self._content(answer)
        rows, meta = content.get("data"), content.get("meta")
        if not isinstance(rows, list) or not isinstance(meta, dict):
            raise Unavailable("list is unreadable")
        pages, total = read_count(meta.get("total_pages")), read_count(meta.get("total_results", 0))
        if read_count(meta.get("page_number")) != page or pages is None or total is None:
            raise Unavailable("list's meta is unreadable")
        return dict(read_row(row) for row in rows), pages, total

    def ahead(self, now: float) -> float:
        """Return the seconds that the clock which says `now` is ahead of Telnyx's; 0.0 if not known.

        Telnyx's time is the `Date` of its last answer to a question (RFC 9110, 6.6.1), to some seconds.
        """
        return 0.0 if self._lead is None else max(0.0, now - self._clock() - self._lead)

    # --- set-up and events ---------------------------------------------------------------------------------

    async def check(self) -> list[Finding]:
        """Ask, read-only, whether the key works and the fax application can send."""
        try:
            answer = await self._ask(f"/fax_applications/{quote(self._connection_id, safe='')}")
            match answer.status:
                case 401 | 403:
                    return [Finding("error", f"telnyx.api_key is not accepted (HTTP {answer.status})")]
                case 404:
                    text = "telnyx.connection_id is no fax application of this account (HTTP 404)"
                    return [Finding("error", text)]
            application = self._content(answer).get("data")
        except Unavailable as error:
            return [Finding("error", f"telnyx.api_base gives no answer: {error.cause}")]
        if not isinstance(application, dict):
            return [Finding("error", "telnyx.api_base gives an unreadable answer")]
        return _findings(application)

    def read_event(self, headers: Mapping[str, str], body: bytes, now: float) -> CarrierEvent:
        """Check the signature over the raw body, then read it. Raises Forged or Malformed."""
        return self._webhooks.read(headers, body, now)

    # --- HTTP ----------------------------------------------------------------------------------------------

    def _session(
        self, connector: aiohttp.TCPConnector, *middlewares: aiohttp.ClientMiddlewareType
    ) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=connector,
            headers=self._headers,
            cookie_jar=aiohttp.DummyCookieJar(),
            # The total is ours, because it must bound the look-up of the name as well.
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._limits.connect),
            trust_env=False,
            middlewares=middlewares,
        )

    def _form(self, call: Call) -> aiohttp.MultipartWriter:
        """Return the parts that Telnyx's multipart schema names, as far as we use them."""
        form = aiohttp.MultipartWriter("form-data")
        for name, value in (
            ("connection_id", self._connection_id),
            ("to", call.number),
            ("from", call.from_number),
            ("quality", call.quality),
            ("t38_enabled", "true" if call.t38 else "false"),
            ("monochrome", "true" if self._monochrome else "false"),
        ):
            part: Payload = StringPayload(value)
            part.headers.popall("Content-Type")  # a text field needs none (RFC 7578, 4.4)
            part.set_content_disposition("form-data", name=name)
            form.append_payload(part)
        # Without a file name the API says 422; the sender's own name would give content away.
        part = BytesIOPayload(io.BytesIO(call.document), content_type="application/pdf")
        part.set_content_disposition("form-data", name="contents", filename="fax.pdf")
        form.append_payload(part)
        return form

    async def _post(
        self, path: str, form: aiohttp.MultipartWriter | None, connector: _OnePost, answer: Answer
    ) -> None:
        """POST on a connection of its own, and fill `answer` as far as it comes."""
        async with (
            self._session(connector) as session,
            session.post(URL(self._base + path, encoded=True), data=form, allow_redirects=False) as response,
        ):
            await _fill(answer, response, _LONGEST_ANSWER)

    async def _ask(self, path: str, query: Mapping[str, str] | None = None) -> Answer:
        """GET; return the whole answer, or raise Unavailable."""
        if self._questions is None:
            raise RuntimeError("the carrier was not opened")
        url, answer = URL(self._base + path, encoded=True).with_query(query), Answer()
        try:
            async with (
                asyncio.timeout(self._limits.question),
                self._questions.get(url, allow_redirects=False) as response,
            ):
                await _fill(answer, response, _LONGEST_LIST)
        except _NETWORK_ERRORS as error:
            raise Unavailable(f"no answer ({type(error).__name__})") from None
        if (date := read_date(read_text(answer.headers.get("Date")))) is not None:
            self._lead = date - self._clock()
        return answer

    def _content(self, answer: Answer) -> dict[str, Any]:
        """Return the JSON object of the answer to a question; {} when unreadable. Raises Unavailable."""
        if answer.status != HTTPStatus.OK:
            raise unanswered(answer, self._clock())
        return answer.members()


async def _ask_once(
    request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
) -> aiohttp.ClientResponse:
    """Keep aiohttp from repeating a GET by itself when a kept connection is cut."""
    try:
        return await handler(request)
    except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as error:
        raise Unavailable(f"no answer ({type(error).__name__})") from None


async def _fill(answer: Answer, response: aiohttp.ClientResponse, most: int) -> None:
    answer.status, answer.headers = response.status, response.headers
    while len(answer.body) < most and (chunk := await response.content.read(most - len(answer.body))):
        answer.body += chunk


def _findings(application: Mapping[str, Any]) -> list[Finding]:
    """Return what is known of a fax application: that it is there, what is wrong, where its events go."""
    name = read_text(application.get("application_name"))
    findings = [Finding("ok", f"telnyx.api_key works; fax application: {name or 'without a name'}")]
    if application.get("active") is False:
        findings.append(Finding("error", "the fax application is not active"))
    outbound = application.get("outbound")
    profile = outbound.get("outbound_voice_profile_id") if isinstance(outbound, dict) else None
    if not read_connection(profile):
        text = "the fax application has no outbound voice profile: every fax would fail (no_outbound_profile)"
        findings.append(Finding("error", text))
    if url := read_text(application.get("webhook_event_url")):
        findings.append(Finding("ok", f"events go to {url}"))
    else:
        text = "the fax application has no webhook_event_url: outcomes are learned by asking, and later"
        findings.append(Finding("warning", text))
    return findings
