"""Telnyx's webhooks.

In charge of: whether an event is Telnyx's (Ed25519, RFC 8032), and what it says, in each of its forms.

Promises: an event is read only after its signature was found good over the raw bytes. Nothing that was
signed raises anything but `Malformed`, however odd its JSON. Links in events are never followed.

Fails: `Forged` and `Malformed`; `ValueError` for a public key that cannot be one. Sources: "Receiving
Webhooks for Programmable Fax" and "Webhook fundamentals" on developers.telnyx.com.
"""

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from gateway.carrier import CarrierEvent, Forged, Malformed
from gateway.doubt import Sighting
from gateway.reasons import LONGEST_NAME
from gateway.records import Stage
from gateway.telnyx_answers import (
    read_connection,
    read_fax_id,
    read_json,
    read_moment,
    read_number,
    read_report,
    read_text,
)

SIGNATURE_HEADER = "telnyx-signature-ed25519"
TIMESTAMP_HEADER = "telnyx-timestamp"
TOLERANCE = 300.0
"""Seconds that a signature may be old or early: what Telnyx's own libraries allow."""

_SIGNATURE_LENGTH = 64  # bytes (RFC 8032, 5.1.6)
_STAGES = {
    "fax.queued": Stage.TAKEN,
    "fax.media.processed": Stage.CONVERTED,
    "fax.sending.started": Stage.SENDING,
    "fax.delivered": Stage.DELIVERED,
    "fax.failed": Stage.FAILED,
}
_INBOUND = frozenset({"fax.receiving.started", "fax.media.processing.started", "fax.received"})


class Webhooks:
    """Checks and reads events. Without a public key nothing gets through."""

    def __init__(self, public_key: str) -> None:
        """Take the account's public key, Base64 of 32 bytes, or "". Raises ValueError for anything else."""
        self._key = _read_key(public_key) if public_key else None

    def read(self, headers: Mapping[str, str], body: bytes, now: float) -> CarrierEvent:
        """Check the signature over the raw body, then read it. Raises Forged or Malformed."""
        skew = self._signed_at(headers, body) - now
        # Only now, so that this cause is never a stranger's doing: a clock is wrong, or a true event is
        # played again.
        if abs(skew) > TOLERANCE:
            raise Forged(f"timestamp is {skew:+.0f} s from our clock")
        try:
            event = read_json(body)
        except ValueError:
            raise Malformed("not strict JSON") from None
        # Sent wrapped in "data"; the tutorial and the delivery log show the bare event.
        if isinstance(event, dict) and isinstance(event.get("data"), dict):
            event = event["data"]
        return _read_event(event, now)

    def _signed_at(self, headers: Mapping[str, str], body: bytes) -> int:
        """Return the time of a good signature, which is over the timestamp's text, "|" and the raw body."""
        if self._key is None:
            raise Forged("no public key configured")
        signature, timestamp = _only(headers, SIGNATURE_HEADER), _only(headers, TIMESTAMP_HEADER)
        if not re.fullmatch(r"[0-9]{1,12}", timestamp):
            raise Forged("timestamp is not a number of seconds")
        try:
            signed = base64.b64decode(signature, validate=True)
        except ValueError:
            raise Forged("signature is not Base64") from None
        if len(signed) != _SIGNATURE_LENGTH:
            raise Forged("signature has the wrong length")
        try:
            self._key.verify(signed, timestamp.encode() + b"|" + body)
        except InvalidSignature:
            raise Forged("signature does not match") from None
        return int(timestamp)


def _read_key(public_key: str) -> Ed25519PublicKey:
    try:
        raw = base64.b64decode(public_key, validate=True)
        key = Ed25519PublicKey.from_public_bytes(raw)
    except ValueError:
        raise ValueError("the public key is not Base64 of 32 bytes") from None
    if not any(raw):  # a placeholder, and a point of small order, for which anybody can sign
        raise ValueError("the public key is all zeros")
    return key


def _only(headers: Mapping[str, str], name: str) -> str:
    """Return the one value of a header, whatever its case; twice is as bad as never."""
    values = [value for key, value in headers.items() if key.lower() == name]
    if len(values) != 1:
        raise Forged(f"{name} stands twice" if values else f"{name} is missing")
    return values[0]


def _read_event(event: object, now: float) -> CarrierEvent:
    """Read a bare event. Its type and the fax's id must be there; the rest is optional."""
    if not isinstance(event, dict):
        raise Malformed("the event is not an object")
    word, payload = read_text(event.get("event_type"), LONGEST_NAME), event.get("payload")
    if not word.startswith("fax."):
        raise Malformed("event_type is not that of a fax event")
    if not isinstance(payload, dict):
        raise Malformed("payload is not an object")
    carrier_id = read_fax_id(payload.get("fax_id")) or read_fax_id(payload.get("id"))
    if carrier_id is None:
        raise Malformed("payload holds no fax id")
    occurred_at = read_moment(event.get("occurred_at"))
    # An incoming fax may be "delivered" and may fail, too: that is no progress of ours.
    outbound = (payload.get("direction") or ("inbound" if word in _INBOUND else "outbound")) == "outbound"
    stage = _STAGES.get(word) if outbound else None
    return CarrierEvent(
        id=_event_id(event),
        type=word,
        sighting=Sighting(
            carrier_id=carrier_id,
            to_number=read_number(payload.get("to")),
            from_number=read_number(payload.get("from")),
            connection_id=read_connection(payload.get("connection_id")),
            seen_at=now if occurred_at is None else occurred_at,
        ),
        outbound=outbound,
        report=None if stage is None else read_report(stage, payload, asked=False),
    )


def _event_id(event: Mapping[str, Any]) -> str:
    """Return the event's own id, the same at each delivery; without one, the hash of what it says."""
    own = event.get("id")
    if isinstance(own, str) and own and own == read_text(own):
        return own
    canonical = json.dumps(event, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
