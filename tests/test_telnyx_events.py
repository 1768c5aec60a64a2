"""Webhooks: who may speak to us, and what each form of an event says."""

import base64
import hashlib
import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict, CIMultiDictProxy
from raw_http import CONNECTION, FAX, FROM, NOW, TO, telnyx

from gateway.carrier import Carrier, CarrierEvent, Forged, Malformed
from gateway.doubt import Sighting
from gateway.records import Report, Stage
from gateway.telnyx_events import Webhooks

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC_KEY = base64.b64encode(KEY.public_key().public_bytes_raw()).decode()
STAMP = str(int(NOW))
EVENT_ID = "0ccc7b54-4df3-4bca-a65a-3da1ecc777f0"


def sign(body: bytes, stamp: str = STAMP, key: Ed25519PrivateKey = KEY) -> dict[str, str]:
    """Return the headers that Telnyx would send with this body."""
    signature = base64.b64encode(key.sign(stamp.encode() + b"|" + body)).decode()
    return {"Telnyx-Signature-Ed25519": signature, "Telnyx-Timestamp": stamp}


def event(event_type: str = "fax.delivered", /, **payload: object) -> dict[str, Any]:
    """Return a bare event of an outbound fax."""
    members = {
        "fax_id": FAX,
        "connection_id": CONNECTION,
        "direction": "outbound",
        "from": FROM,
        "to": TO,
        "user_id": "u",
        "status": "delivered",
    }
    return {
        "record_type": "event",
        "event_type": event_type,
        "id": EVENT_ID,
        "occurred_at": "2026-01-05T22:23:40.250000Z",
        "payload": {key: value for key, value in (members | payload).items() if value != "absent"},
    }


def read(content: object, now: float = NOW) -> CarrierEvent:
    """Sign and read an event."""
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    return Webhooks(PUBLIC_KEY).read(sign(body), body, now)


# --- who may speak -----------------------------------------------------------------------------------------


def test_known_signature_of_the_standard_is_accepted() -> None:
    """A signature made by another program, over the timestamp, a bar and the raw bytes, is good."""
    # Made with: openssl pkeyutl -sign -rawin, on "1767651826|" and the body below, with KEY.
    body = b'{"data": {"event_type": "fax.queued", "payload": {"fax_id": "f-1"}}}'
    signature = "IjZMUr9wwAHjQnRkv9IMPWsVEotpFk0klo6AUFeqNCYiXyF924Sw9pTzb5e0fRmfg5BJbpordFpk93OZRGmVAw=="
    headers = {"telnyx-signature-ed25519": signature, "telnyx-timestamp": "1767651826"}
    assert Webhooks(PUBLIC_KEY).read(headers, body, NOW).sighting.carrier_id == "f-1"


def test_carrier_reads_events_with_its_key() -> None:
    """The webhook door asks the carrier, which knows the account's public key."""
    carrier: Carrier = telnyx("https://api.telnyx.com/v2", public_key=PUBLIC_KEY)
    body = json.dumps({"data": event(), "meta": {"attempt": 1}}).encode()
    assert carrier.read_event(sign(body), body, NOW).id == EVENT_ID


def test_without_a_key_the_door_is_shut() -> None:
    """A gateway without the public key believes nobody."""
    with pytest.raises(Forged, match="no public key configured"):
        Webhooks("").read(sign(b"{}"), b"{}", NOW)


@pytest.mark.parametrize(
    "key",
    [
        "x",
        "AAAA",
        PUBLIC_KEY[:-4],
        PUBLIC_KEY + "AAAA",
        " " + PUBLIC_KEY,
        "é",
        base64.b64encode(bytes(32)).decode(),
    ],
)
def test_key_that_cannot_be_one_is_refused(key: str) -> None:
    """A mistyped key, or a placeholder of zeros, for which anybody can sign, stops the start."""
    with pytest.raises(ValueError, match="public key"):
        Webhooks(key)


BODY = json.dumps(event()).encode()
GOOD = sign(BODY)
SIGNATURE = GOOD["Telnyx-Signature-Ed25519"]
# The group order, added to the second half: the same signature in a form that RFC 8032 (5.1.7) forbids.
_RAW = base64.b64decode(SIGNATURE)
_ORDER = 2**252 + 27742317777372353535851937790883648493
MALLEATED = base64.b64encode(
    _RAW[:32] + (int.from_bytes(_RAW[32:], "little") + _ORDER).to_bytes(32, "little")
).decode()


@pytest.mark.parametrize(
    ("headers", "cause"),
    [
        ({}, "telnyx-signature-ed25519 is missing"),
        ({"telnyx-signature-ed25519": SIGNATURE}, "telnyx-timestamp is missing"),
        ({"telnyx-timestamp": STAMP}, "telnyx-signature-ed25519 is missing"),
        (GOOD | {"telnyx-timestamp": STAMP}, "telnyx-timestamp stands twice"),
        (GOOD | {"TELNYX-SIGNATURE-ED25519": SIGNATURE}, "telnyx-signature-ed25519 stands twice"),
        (GOOD | {"Telnyx-Signature-Ed25519": ""}, "signature has the wrong length"),
        (GOOD | {"Telnyx-Signature-Ed25519": "!" + SIGNATURE[1:]}, "signature is not Base64"),
        (GOOD | {"Telnyx-Signature-Ed25519": SIGNATURE + "\n"}, "signature is not Base64"),
        (GOOD | {"Telnyx-Signature-Ed25519": " " + SIGNATURE}, "signature is not Base64"),
        (GOOD | {"Telnyx-Signature-Ed25519": SIGNATURE.rstrip("=")}, "signature is not Base64"),
        (GOOD | {"Telnyx-Signature-Ed25519": "ä" + SIGNATURE[1:]}, "signature is not Base64"),
        (GOOD | {"Telnyx-Signature-Ed25519": "\udce4" + SIGNATURE[1:]}, "signature is not Base64"),
        (GOOD | {"Telnyx-Signature-Ed25519": SIGNATURE[4:]}, "signature has the wrong length"),
        (GOOD | {"Telnyx-Signature-Ed25519": "AAAA" + SIGNATURE}, "signature has the wrong length"),
        (GOOD | {"Telnyx-Signature-Ed25519": "AAAA" + SIGNATURE[4:]}, "signature does not match"),
        (GOOD | {"Telnyx-Signature-Ed25519": MALLEATED}, "signature does not match"),
        (sign(BODY, key=Ed25519PrivateKey.from_private_bytes(bytes(32))), "signature does not match"),
        (sign(b" " + BODY), "signature does not match"),
        (sign(json.dumps(event(), separators=(",", ":")).encode()), "signature does not match"),
        (GOOD | {"Telnyx-Timestamp": str(int(NOW) + 1)}, "signature does not match"),
        (GOOD | {"Telnyx-Timestamp": "0" + STAMP}, "signature does not match"),
    ],
)
def test_forged_event_is_refused(headers: dict[str, str], cause: str) -> None:
    """Nobody but the owner of the key can speak, over these very bytes and this very time."""
    with pytest.raises(Forged) as caught:
        Webhooks(PUBLIC_KEY).read(headers, BODY, NOW)
    assert caught.value.cause == cause


def test_header_twice_in_a_request_is_refused() -> None:
    """Two values of one header, as the web server hands them over, are not picked from."""
    headers = CIMultiDict(GOOD)
    assert Webhooks(PUBLIC_KEY).read(CIMultiDictProxy(headers), BODY, NOW).id == EVENT_ID
    headers.add("telnyx-timestamp", STAMP)
    with pytest.raises(Forged, match="telnyx-timestamp stands twice"):
        Webhooks(PUBLIC_KEY).read(CIMultiDictProxy(headers), BODY, NOW)


@pytest.mark.parametrize(
    "stamp",
    ["", "-1", "+1", "1e3", "1.5", " 1767651826", "1767651826 ", "١٧٦٧", "soon", "1" * 13, "1" + "0" * 30],
)
def test_timestamp_that_is_no_number_is_refused(stamp: str) -> None:
    """Only plain ASCII digits are a time, even when they are signed."""
    with pytest.raises(Forged, match="timestamp is not a number of seconds"):
        Webhooks(PUBLIC_KEY).read(sign(BODY, stamp), BODY, NOW)


@pytest.mark.parametrize("skew", [-300, -299, 0, 300])
def test_event_within_the_tolerance_is_read(skew: int) -> None:
    """Five minutes of difference between the clocks are allowed, both ways."""
    assert Webhooks(PUBLIC_KEY).read(sign(BODY, str(int(NOW) + skew)), BODY, NOW).id == EVENT_ID


@pytest.mark.parametrize(("skew", "told"), [(-301, "-301 s"), (301, "+301 s"), (-int(NOW), "-1767651826 s")])
def test_stale_event_is_refused_and_the_skew_is_told(skew: int, told: str) -> None:
    """An old event played again is refused; where it is our clock that is wrong, the log says by how much."""
    with pytest.raises(Forged, match="from our clock") as caught:
        Webhooks(PUBLIC_KEY).read(sign(BODY, str(int(NOW) + skew)), BODY, NOW)
    assert told in caught.value.cause


def test_skew_is_told_only_of_signed_events() -> None:
    """A stranger cannot make the log say that our clock is wrong."""
    with pytest.raises(Forged, match="signature does not match"):
        Webhooks(PUBLIC_KEY).read(GOOD | {"Telnyx-Timestamp": "17"}, BODY, NOW)


# --- what they say -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event_type", "payload", "report"),
    [
        ("fax.queued", {"call_duration_secs": 79}, Report(Stage.TAKEN, asked=False, duration=79)),
        ("fax.media.processed", {"status": "media.processed"}, Report(Stage.CONVERTED, asked=False)),
        ("fax.sending.started", {"status": "sending.started"}, Report(Stage.SENDING, asked=False)),
        (
            "fax.delivered",
            {"page_count": "3", "call_duration_secs": 79},
            Report(Stage.DELIVERED, asked=False, pages=3, duration=79),
        ),
        (
            "fax.failed",
            {"failure_reason": "user_busy", "internal_failure_reason": "isdn_17"},
            Report(Stage.FAILED, asked=False, reason="user_busy", internal_reason="isdn_17"),
        ),
        ("fax.failed", {"status": "delivered"}, Report(Stage.FAILED, asked=False)),
        (
            "fax.delivered",
            {"page_count": -3, "call_duration_secs": "x"},
            Report(Stage.DELIVERED, asked=False),
        ),
        ("fax.sending", {"status": "delivered"}, None),
        ("fax.email.delivered", {}, None),
        ("fax.on_the_moon", {}, None),
    ],
)
@pytest.mark.parametrize("wrapped", [True, False])
def test_event_says_how_far_the_fax_is(
    event_type: str, payload: dict[str, object], report: Report | None, *, wrapped: bool
) -> None:
    """Every outbound event is understood in both envelopes, by its type; an unknown one changes nothing."""
    bare = event(event_type, **payload)
    got = read({"data": bare, "meta": {"attempt": 2}} if wrapped else bare)
    assert got == CarrierEvent(
        id=EVENT_ID,
        type=event_type,
        sighting=Sighting(FAX, TO, FROM, CONNECTION, NOW - 5.75),
        outbound=True,
        report=report,
    )


@pytest.mark.parametrize(
    ("event_type", "direction", "outbound"),
    [
        ("fax.delivered", "outbound", True),
        ("fax.delivered", "inbound", False),
        ("fax.failed", "inbound", False),
        ("fax.failed", "absent", True),
        ("fax.failed", None, True),
        ("fax.failed", "sideways", False),
        ("fax.received", "inbound", False),
        ("fax.received", "absent", False),
        ("fax.receiving.started", "absent", False),
        ("fax.media.processing.started", None, False),
    ],
)
def test_incoming_fax_is_told_apart(event_type: str, direction: object, *, outbound: bool) -> None:
    """What happens to an incoming fax never moves one of ours."""
    got = read(event(event_type, direction=direction))
    assert got.outbound is outbound
    assert (got.report is not None) is outbound


def test_only_type_and_fax_are_needed() -> None:
    """An event with nothing but its type and the fax is understood; it happened when it came."""
    bare = {"event_type": "fax.failed", "payload": {"id": FAX}}
    got = read({"data": bare})
    canonical = '{"event_type":"fax.failed","payload":{"id":"' + FAX + '"}}'
    assert got == CarrierEvent(
        id=hashlib.sha256(canonical.encode()).hexdigest(),
        type="fax.failed",
        sighting=Sighting(FAX, "", "", "", NOW),
        outbound=True,
        report=Report(Stage.FAILED, asked=False),
    )


@pytest.mark.parametrize("own", [None, "", 17, ["x"], "a\nb", "x" * 201])
def test_event_without_a_usable_id_has_the_same_id_each_time(own: object) -> None:
    """Two deliveries of one event are recognised although the carrier gave it no id, and others are not."""
    first = read({"data": event() | {"id": own}, "meta": {"attempt": 1}})
    again = read({"meta": {"attempt": 2}, "data": event() | {"id": own}})
    other = read({"data": event(status="failed") | {"id": own}})
    assert first.id == again.id
    assert first.id != other.id
    assert len(first.id) == 64


@pytest.mark.parametrize("occurred_at", [None, "", "yesterday", 1767651826, "2026-13-05T22:23:46Z"])
def test_event_without_a_readable_time_happened_now(occurred_at: object) -> None:
    """A time that cannot be read does not lose the event."""
    assert read(event() | {"occurred_at": occurred_at}).sighting.seen_at == NOW


def test_numbers_of_an_event_are_compared_as_e164() -> None:
    """A number whose + was lost is still ours, and a connection's id may come as a number."""
    got = read(event(**{"to": " " + TO[1:], "from": FROM[1:], "connection_id": int(CONNECTION)}))
    assert got.sighting == Sighting(FAX, TO, FROM, CONNECTION, NOW - 5.75)


def test_text_of_an_event_is_printable_and_short() -> None:
    """What a carrier writes into a reason cannot break a log line, a mail or the store."""
    got = read(
        event("fax.failed", failure_reason="a\r\nb\x00" + "c" * 500, internal_failure_reason="\u202ex")
    )
    assert got.report is not None
    assert got.report.reason == "ab" + "c" * 78
    assert got.report.internal_reason == "x"


@pytest.mark.parametrize(
    ("body", "cause"),
    [
        (b"", "not strict JSON"),
        (b"\xff\xfe", "not strict JSON"),
        (b"[" * 100_000, "not strict JSON"),
        (b'{"a":' * 100_000, "not strict JSON"),
        (b'{"data": NaN}', "not strict JSON"),
        (b'{"data": 1, "data": 2}', "not strict JSON"),
        (json.dumps(event()).replace(FROM, "\\ud800").encode(), "not strict JSON"),
        (b'{"data": ' + b"1" * 5_000 + b"}", "not strict JSON"),
        (b"[]", "the event is not an object"),
        (b"null", "the event is not an object"),
        (b'"fax.delivered"', "the event is not an object"),
        (b"1e400", "the event is not an object"),
        (b"{}", "event_type is not that of a fax event"),
        (b'{"data": []}', "event_type is not that of a fax event"),
        (json.dumps(event() | {"event_type": 17}).encode(), "event_type is not that of a fax event"),
        (json.dumps(event("message.sent")).encode(), "event_type is not that of a fax event"),
        (json.dumps(event() | {"payload": []}).encode(), "payload is not an object"),
        (json.dumps(event() | {"payload": None}).encode(), "payload is not an object"),
        (json.dumps(event(fax_id="absent")).encode(), "payload holds no fax id"),
        (json.dumps(event(fax_id=17)).encode(), "payload holds no fax id"),
        (json.dumps(event(fax_id="../x")).encode(), "payload holds no fax id"),
    ],
    ids=lambda value: str(value[:40]),
)
def test_signed_nonsense_is_malformed(body: bytes, cause: str) -> None:
    """Signed bytes that are no event are told apart from forgeries, and break nothing."""
    with pytest.raises(Malformed) as caught:
        read(body)
    assert caught.value.cause == cause


def test_huge_numbers_in_an_event_are_left_out() -> None:
    """A page count beyond reason neither breaks the event nor reaches the store."""
    body = json.dumps(event(page_count="PAGES")).replace('"PAGES"', "1" + "0" * 400).encode()
    got = read(body)
    assert got.report is not None
    assert got.report.pages is None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.dictionaries(st.sampled_from(["event_type", "id", "occurred_at", "payload"]), json_values),
    st.dictionaries(
        st.sampled_from(
            ["fax_id", "to", "from", "direction", "connection_id", "page_count", "failure_reason"]
        ),
        json_values,
    ),
)
def test_odd_types_break_nothing(outer: dict[str, Any], inner: dict[str, Any]) -> None:
    """Wrong types anywhere in a signed event make it malformed, or are left out."""
    whole = event() | outer
    if isinstance(whole["payload"], dict):
        whole["payload"] = whole["payload"] | inner
    body = json.dumps(whole).encode()
    try:
        got = read(body)
    except Malformed:
        return
    assert got.sighting.carrier_id == whole["payload"].get("fax_id", whole["payload"].get("id"))
