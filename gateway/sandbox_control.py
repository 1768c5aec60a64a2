"""The control addresses of the sandbox, `/sandbox/…`: its logs to read, its switches to throw while it runs.

In charge of: JSON in and out for what `Sandbox` offers to a test inside its process.
Promises: a change is made whole or not at all; no key is asked for, so the sandbox belongs on loopback.
Fails: `RequestError`, 400 for what is no JSON, 422 for what cannot be used, with every fault named.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from aiohttp import web

from gateway.sandbox_exchange import LedgerEntry
from gateway.sandbox_requests import RequestError, error
from gateway.sandbox_script import ScriptError
from gateway.sandbox_webhooks import SentWebhook


@dataclass(slots=True)
class RequestSeen:
    """A request under `/v2`; `query` as it was written, `status` None until (or unless) it was answered."""

    time: float
    method: str
    path: str
    query: str
    status: int | None = None


class Controlled(Protocol):
    """What the control addresses need of the sandbox."""

    requests: list[RequestSeen]
    events: list[SentWebhook]

    @property
    def ledger(self) -> list[LedgerEntry]:
        """Every fax that was taken."""

    def set_script(self, script: Mapping[str, str | Sequence[str]]) -> None:
        """Replace the script, or raise `ScriptError`."""

    def set_account(self, state: str) -> None:
        """Break or mend the account, or raise `ValueError`."""

    def set_list(self, *, lag_seconds: float = 0.0, empty: bool = False) -> None:
        """Change what the list keeps back."""


class Control:
    """The handlers of `/sandbox/…` over one sandbox."""

    def __init__(self, sandbox: Controlled) -> None:
        self._sandbox = sandbox

    def routes(self) -> list[web.RouteDef]:
        """List the addresses."""
        return [
            web.get("/sandbox/ledger", self._ledger, allow_head=False),
            web.get("/sandbox/requests", self._requests, allow_head=False),
            web.get("/sandbox/webhooks", self._webhooks, allow_head=False),
            web.put("/sandbox/script", self._script),
            web.put("/sandbox/account", self._account),
            web.put("/sandbox/list", self._list),
        ]

    async def _ledger(self, _request: web.Request) -> web.Response:
        return _rows(self._sandbox.ledger)

    async def _requests(self, _request: web.Request) -> web.Response:
        return _rows(self._sandbox.requests)

    async def _webhooks(self, _request: web.Request) -> web.Response:
        return _rows(self._sandbox.events)

    async def _script(self, request: web.Request) -> web.Response:
        try:
            self._sandbox.set_script(await _json_object(request))
        except ScriptError as fault:
            raise RequestError(422, *(_unusable(line) for line in str(fault).splitlines())) from fault
        return web.Response(status=204)

    async def _account(self, request: web.Request) -> web.Response:
        try:
            self._sandbox.set_account(str((await _json_object(request)).get("state")))
        except ValueError as fault:
            raise RequestError(422, _unusable(str(fault))) from fault
        return web.Response(status=204)

    async def _list(self, request: web.Request) -> web.Response:
        wanted = {"lag_seconds": 0.0, "empty": False} | await _json_object(request)
        match wanted:
            case {"lag_seconds": int() | float() as lag, "empty": bool() as empty} if len(wanted) == 2:  # noqa: PLR2004 - no others
                self._sandbox.set_list(lag_seconds=lag, empty=empty)
            case _:
                raise RequestError(
                    422, _unusable("expected lag_seconds (a number) and empty (true or false)")
                )
        return web.Response(status=204)


def _rows(rows: Sequence[LedgerEntry | RequestSeen | SentWebhook]) -> web.Response:
    """Show records as JSON; the field `from_` is called `from`."""
    data = [{key.rstrip("_"): value for key, value in asdict(row).items()} for row in rows]
    return web.json_response({"data": data})


async def _json_object(request: web.Request) -> dict[str, Any]:
    try:
        body = await request.json()
    except json.JSONDecodeError as fault:
        raise RequestError(400, error("10023", "Invalid JSON", str(fault))) from fault
    if not isinstance(body, dict):
        raise RequestError(422, _unusable("expected an object"))
    return body


def _unusable(detail: str) -> dict[str, Any]:
    return error("10027", "Unprocessable Entity", detail)
