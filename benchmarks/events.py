"""The carrier's events, signed with a key that every program of the benchmarks knows."""

import base64
import json
import time
import uuid

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC_KEY = base64.b64encode(KEY.public_key().public_bytes_raw()).decode()


def event(event_type: str, carrier_id: str, to: str) -> bytes:
    """Return the body of an event about a fax that the carrier knows under this id."""
    payload: dict[str, str | int] = {
        "fax_id": carrier_id, "connection_id": "1232154810234", "direction": "outbound",
        "from": "+13125790015", "to": to, "status": event_type.removeprefix("fax."),
    }  # fmt: skip
    if event_type == "fax.delivered":
        payload |= {"page_count": 1, "call_duration_secs": 60}
    moment = time.time()
    occurred = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(moment)) + f".{int(moment % 1 * 1e6):06}Z"
    record = {
        "record_type": "event", "event_type": event_type, "id": str(uuid.uuid4()), "occurred_at": occurred,
        "payload": payload,
    }  # fmt: skip
    return json.dumps({"data": record, "meta": {"attempt": 1}}).encode()


def request(body: bytes, port: int) -> bytes:
    """Return the whole signed request, for a connection that is kept."""
    moment = str(int(time.time()))
    signature = base64.b64encode(KEY.sign(moment.encode() + b"|" + body)).decode()
    head = (
        f"POST /webhooks/telnyx HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\ntelnyx-timestamp: {moment}\r\n"
        f"telnyx-signature-ed25519: {signature}\r\n\r\n"
    )
    return head.encode() + body
