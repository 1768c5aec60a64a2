"""The exchange of the sandbox: takes faxes, writes the ledger, places calls and has their webhooks sent.

In charge of: which behaviour a submission meets, what was taken, what the list shows, the calls under way.
Promises: a fax is in the ledger once it is taken; a call never waits for the receiver of its webhooks; the
events of one fax go out one after another.
Fails: an exception in a hook of the caller ends the webhooks of that one fax and is logged by asyncio.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from gateway.sandbox_behaviours import BEHAVIOURS, Behaviour, Outcome
from gateway.sandbox_calls import SandboxFax, run_call
from gateway.sandbox_requests import ListQuery, Submission
from gateway.sandbox_script import Choices
from gateway.sandbox_webhooks import WebhookSender

MAX_PAGES = 350  # Telnyx, "Send a fax": beyond it a fax fails with page_count_limit_exceeded

Envelope = Literal["data", "bare", "both in turn"]


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """A fax that was taken. `order` counts all of them from 1.

    `copy` counts those with this number and this document: 2 is a second call, wanted or not. `pages` is None
    for a document that could not be read; `answered` is how the POST was: a status, "cut" or "silence".
    """

    time: float
    order: int
    copy: int
    fax_id: str
    to: str
    from_: str
    sha256: str
    size: int
    pages: int | None
    fields: Mapping[str, str]
    behaviour: str
    answered: str


@dataclass(slots=True)
class ListRules:
    """What the list keeps back: each fax for `lag_seconds` after it was taken, or (`empty`) all of them."""

    lag_seconds: float = 0.0
    empty: bool = False


class Exchange:
    """Takes faxes and runs their calls; `changed` is called whenever something is different."""

    def __init__(
        self,
        choices: Choices,
        webhooks: WebhookSender,
        clock: Callable[[], float],
        changed: Callable[[], None],
        *,
        call_time: float,
        lag: float,
        envelope: Envelope,
    ) -> None:
        self.ledger: list[LedgerEntry] = []
        self.faxes: dict[str, SandboxFax] = {}
        self.list_rules = ListRules()
        self._choices = choices
        self._webhooks = webhooks
        self._clock = clock
        self._changed = changed
        self._call_time = call_time
        self._lag = lag
        self._envelope = envelope
        self._copies: Counter[tuple[str, str]] = Counter()
        self._calls: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Cut every call; nothing more is sent."""
        for call in self._calls:
            call.cancel()
        await asyncio.gather(*self._calls, return_exceptions=True)

    def choose(self, submission: Submission) -> tuple[str, Behaviour]:
        """Name the behaviour this submission meets, its end put right if the document cannot be faxed."""
        name = self._choices.next(submission.to, submission.sha256)
        behaviour = BEHAVIOURS[name]
        if not submission.is_pdf:
            return name, replace(behaviour, ends=(Outcome("failed", "file_format_invalid"),))
        if (submission.pages or 0) > MAX_PAGES:
            return name, replace(behaviour, ends=(Outcome("failed", "page_count_limit_exceeded"),))
        return name, behaviour

    def take(self, name: str, behaviour: Behaviour, submission: Submission) -> SandboxFax:
        """Write a fax into the ledger; its call begins with `begin`."""
        now = round(
            self._clock(), 6
        )  # as exact as it is told, so that a bound on created_at finds its own fax
        fax = SandboxFax(
            order=len(self.ledger) + 1,
            to=submission.to,
            from_=submission.from_,
            fields=submission.fields,
            pages=submission.pages,
            behaviour=behaviour,
            created_at=now,
            hidden_until=now + self._lag if behaviour.hidden else now,
        )
        self._copies[submission.to, submission.sha256] += 1
        entry = LedgerEntry(
            time=now,
            order=fax.order,
            copy=self._copies[submission.to, submission.sha256],
            fax_id=fax.id,
            to=fax.to,
            from_=fax.from_,
            sha256=submission.sha256,
            size=submission.size,
            pages=submission.pages,
            fields=submission.fields,
            behaviour=name,
            answered=behaviour.answer.summary,
        )
        self.faxes[fax.id] = fax
        self.ledger.append(entry)
        self._changed()
        return fax

    def begin(self, fax: SandboxFax) -> asyncio.Task[None]:
        """Place the call; the task ends when the call has and its webhooks are sent or given up."""
        call = asyncio.create_task(self._run(fax))
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)
        return call

    async def _run(self, fax: SandboxFax) -> None:
        events: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        # Webhooks that must all be out before the answer cannot wait for the call's own time.
        call_time = 0.0 if fax.behaviour.webhooks.before_answer else self._call_time
        async with asyncio.TaskGroup() as group:
            group.create_task(self._send(fax, events))
            async for event in run_call(fax, call_time, self._clock):
                self._changed()
                if event is not None:
                    events.put_nowait(event)
            events.put_nowait(None)

    async def _send(self, fax: SandboxFax, events: asyncio.Queue[dict[str, Any] | None]) -> None:
        """Send the events of one fax as its behaviour says, until None ends the call."""
        how = fax.behaviour.webhooks
        kept: list[tuple[dict[str, Any], bool]] = []
        index = 0
        while (event := await events.get()) is not None:
            # In turn within a fax, and each fax begins with the other form: so ends come in both.
            enveloped = (
                self._envelope == "data" if self._envelope != "both in turn" else (fax.order + index) % 2 == 1
            )
            index += 1
            if how.backwards:
                kept.append((event, enveloped))
            elif how.sent:
                await self._webhooks.send(event, how, enveloped=enveloped)
        for event, enveloped in reversed(kept):
            await self._webhooks.send(event, how, enveloped=enveloped)

    def listed(self, query: ListQuery) -> list[SandboxFax]:
        """Find what the list shows for a question, newest first, all pages."""
        if self.list_rules.empty:
            return []
        now = self._clock()
        return [
            fax
            for fax in reversed(self.faxes.values())
            if now >= fax.hidden_until
            and now >= fax.created_at + self.list_rules.lag_seconds
            and query.selects(fax.to, fax.from_, fax.created_at)
        ]
