"""The calls of the sandbox carrier: a fax from acceptance to its end, step by step.

In charge of: the record of a fax, its statuses over the call time, cancelling, and the events about it.
Promises: statuses follow the clock of the call and never wait for webhooks; an ended fax takes no cancel.
Fails: nothing here reaches outside, so nothing here fails.

Fax object: Telnyx's schema `Fax`. Events and their fields: Telnyx's page "Receiving webhooks" for faxes.
"""

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from gateway.sandbox_behaviours import MEDIA_REASONS, Behaviour, Outcome

USER_ID = "bdaa1f9f-1018-4156-867d-6c4ac9f556eb"
CANCELLED = Outcome("failed", "sender_canceled")


@dataclass(frozen=True, slots=True)
class Step:
    """A moment of a call: when (in call times from acceptance), the status from then on, the event if any."""

    at: float
    status: str
    event_type: str | None
    outcome: Outcome | None = None


def steps_of(behaviour: Behaviour) -> tuple[Step, ...]:
    """Lay out a call; no event tells of `originated`, and a document that is refused is never dialled for."""
    steps = [Step(0, "queued", "fax.queued")]
    if not (behaviour.ends and behaviour.ends[0].reason in MEDIA_REASONS):
        steps += [
            Step(1 / 3, "media.processed", "fax.media.processed"),
            Step(1 / 2, "originated", None),
            Step(2 / 3, "sending", "fax.sending.started"),
        ]
        if behaviour.webhooks.unknown_type:
            steps.append(Step(5 / 6, "sending", "fax.sandbox.unknown"))
    steps += [_end(at, outcome) for at, outcome in enumerate(behaviour.ends, start=1)]
    return tuple(steps)


def _end(at: float, outcome: Outcome) -> Step:
    return Step(at, outcome.status, f"fax.{outcome.status}", outcome)


@dataclass(slots=True)
class SandboxFax:
    """A fax that was taken. `order` counts from 1 over all faxes; times are epoch seconds."""

    order: int
    to: str
    from_: str
    fields: Mapping[str, str]
    pages: int | None
    behaviour: Behaviour
    created_at: float
    hidden_until: float = 0.0
    id: str = field(default_factory=lambda: str(uuid.uuid4()))
    status: str = "queued"
    outcome: Outcome | None = None
    updated_at: float = 0.0
    cancel: asyncio.Event = field(default_factory=asyncio.Event)

    def as_json(self, webhook_url: str | None) -> dict[str, Any]:
        """Make the object that the API shows."""
        made: dict[str, Any] = {
            "record_type": "fax",
            "id": self.id,
            "connection_id": self.fields["connection_id"],
            "direction": "outbound",
            "to": self.to,
            "from": self.from_,
            "from_display_name": self.from_,
            "quality": self.fields.get("quality", "high"),
            "store_media": self.fields.get("store_media") == "true",
            "status": self.status,
            "failure_reason": None,
            "internal_failure_reason": None,
            "client_state": "",
            "webhook_url": webhook_url or "",
            "webhook_failover_url": "",
            "created_at": timestamp(self.created_at),
            "updated_at": timestamp(self.updated_at or self.created_at),
        }
        return made | self._end_fields()

    def event(self, event_type: str, now: float) -> dict[str, Any]:
        """Make the event that tells of the present status, without an envelope."""
        status = event_type.removeprefix("fax.") if event_type == "fax.sandbox.unknown" else self.status
        payload = {
            "fax_id": self.id,
            "connection_id": self.fields["connection_id"],
            "direction": "outbound",
            "from": self.from_,
            "to": self.to,
            "status": status,
            "user_id": USER_ID,
        }
        return {
            "event_type": event_type,
            "id": str(uuid.uuid4()),
            "occurred_at": timestamp(now),
            "payload": payload | self._end_fields(),
        }

    def _end_fields(self) -> dict[str, Any]:
        """Say how it ended, in the words that events and fax objects share."""
        if self.outcome is None:
            return {}
        if self.outcome.status == "failed":
            reason = self.outcome.reason
            return (
                {}
                if reason is None
                else {"failure_reason": reason, "internal_failure_reason": f"sandbox_{reason}"}
            )
        pages = self.pages or 1
        told = {"page_count": pages} if self.behaviour.webhooks.page_count else {}
        return {"call_duration_secs": 19 + 60 * pages} | told


def timestamp(moment: float) -> str:
    """Write epoch seconds as Telnyx does: ISO 8601 in UTC with microseconds and `Z`."""
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


async def run_call(
    fax: SandboxFax, call_time: float, clock: Callable[[], float]
) -> AsyncIterator[dict[str, Any] | None]:
    """Take the fax through its steps over `call_time` seconds; after each yield its event, None without one.

    A cancel ends it `failed` at once; a fax with no end waits for one.
    """
    loop = asyncio.get_running_loop()
    start = loop.time()
    for step in steps_of(fax.behaviour):
        if await _cancelled_within(fax, start + step.at * call_time - loop.time()):
            break
        yield _enter(fax, step, clock())
    if fax.outcome is None:
        await fax.cancel.wait()
        yield _enter(fax, _end(1, CANCELLED), clock())


async def _cancelled_within(fax: SandboxFax, seconds: float) -> bool:
    if seconds > 0 and not fax.cancel.is_set():
        try:
            await asyncio.wait_for(fax.cancel.wait(), seconds)
        except TimeoutError:
            return False
    return fax.cancel.is_set()


def _enter(fax: SandboxFax, step: Step, now: float) -> dict[str, Any] | None:
    fax.status, fax.outcome, fax.updated_at = step.status, step.outcome, now
    return None if step.event_type is None else fax.event(step.event_type, now)
