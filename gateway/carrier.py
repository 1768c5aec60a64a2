"""What any carrier does for the gateway, and its ways to fail.

In charge of: the words between the dispatcher and a carrier's own module. One carrier is built in:
`telnyx`; a second one is a second module with these methods.

Promises: whatever goes wrong with a POST ends in exactly one of three errors, and the caller's next
step follows from its type. `InDoubt` is the default for everything nobody classified, because a second
call costs money and a second copy on somebody's floor.

Fails: by these errors alone. `str(error)` is for the log and holds no content and no secret.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from gateway.doubt import Sighting
from gateway.records import Blame, Report


class CarrierError(Exception):
    """Base of the carrier's ways to fail; `cause` is short, stable and safe to log."""

    def __init__(self, cause: str) -> None:
        super().__init__(cause)
        self.cause = cause


class Refused(CarrierError):
    """The carrier answered, and certainly did not take the fax. `reason` names a row of `reasons`."""

    def __init__(self, cause: str, blame: Blame, reason: str) -> None:
        super().__init__(cause)
        self.blame = blame
        self.reason = reason


class Unavailable(CarrierError):
    """Certainly not taken, and a later try may be; or a question that got no answer."""

    def __init__(self, cause: str, retry_after: float | None = None) -> None:
        super().__init__(cause)
        self.retry_after = retry_after  # seconds, when the carrier named them


class InDoubt(CarrierError):
    """The carrier may have taken it. Anything unclassified is this."""


class NotKnown(CarrierError):
    """The carrier does not know the fax that we asked about (404)."""


class Forged(CarrierError):
    """An event that the carrier did not sign, or signed too long ago."""


class Malformed(CarrierError):
    """Signed, but not an event in any form we know."""


@dataclass(frozen=True, slots=True)
class Call:
    """One fax to be sent."""

    number: str = field(repr=False)
    from_number: str = field(repr=False)
    quality: str
    t38: bool
    document: bytes = field(repr=False)  # a PDF


@dataclass(frozen=True, slots=True)
class CarrierEvent:
    """One authentic event of the carrier's."""

    id: str
    type: str  # the carrier's word, for history and log
    sighting: Sighting  # which fax, from where to where, when
    outbound: bool
    report: Report | None  # None: a kind of event that says nothing about the fax's progress


class Carrier(Protocol):
    """What the dispatcher and the webhook door ask of a carrier."""

    async def send(self, call: Call, may_begin: Callable[[], bool]) -> str:
        """POST one fax; return the carrier's id. Raises Refused, Unavailable or InDoubt, nothing else.

        `may_begin` is asked at the last moment before bytes leave; False raises Unavailable.
        """

    async def status(self, carrier_id: str) -> Report:
        """Ask about one fax. Raises NotKnown or Unavailable."""

    async def sent_since(
        self, from_number: str, since: float, to_number: str | None = None
    ) -> list[Sighting]:
        """List every outbound fax from a number, all pages, created at or after `since`; or Unavailable.

        `since` is by the carrier's clock. With `to_number`, only the faxes to that number are asked for.
        """

    def ahead(self, now: float) -> float:
        """Return the seconds that the clock which says `now` is ahead of the carrier's; 0.0 if not known."""

    async def cancel(self, carrier_id: str) -> bool:
        """Ask to cancel; False when it is too late for that. Raises NotKnown or Unavailable."""

    def read_event(self, headers: Mapping[str, str], body: bytes, now: float) -> CarrierEvent:
        """Check the signature over the raw body, then read it. Raises Forged or Malformed."""
