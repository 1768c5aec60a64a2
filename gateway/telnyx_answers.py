"""What Telnyx says about faxes: its JSON, its words, and what each answer to a request means.

In charge of: reading untrusted text into our records, for `telnyx` (answers) and `telnyx_events` (webhooks).
No HTTP is done here.

Promises: `Unavailable` and `Refused` are said only when the fax was certainly not taken; whatever nobody
classified is `InDoubt`. No shape or size of an answer raises anything else. A `cause` is made of the status,
Telnyx's code and the name of a field: no text of the answer, number or secret. Text that goes on to logs,
mails and the store is printable and short.

Fails: by the errors of `carrier`; `read_json` by `ValueError`. Sources: Telnyx's API reference ("Send a fax",
"View a list of faxes"), "API errors" and "Rate limiting", all on developers.telnyx.com.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any

from gateway.carrier import InDoubt, Refused, Unavailable
from gateway.doubt import Sighting
from gateway.reasons import LONGEST_NAME
from gateway.records import Blame, Report, Stage

_STATUS = {
    "queued": Stage.TAKEN,
    "media.processed": Stage.CONVERTED,
    "originated": Stage.DIALLED,
    "delivered": Stage.DELIVERED,
    "failed": Stage.FAILED,
}
_E164 = re.compile(r"\+[1-9][0-9]{6,14}")
_LONGEST_TEXT = 200
_MOST = 1_000_000  # pages of a fax, seconds of a call, rows of a list: anything above is nonsense

# Key bad, missing or revoked (10009, 2000x); not allowed, limited, inactive, blocked, unverified, no funds.
_ACCOUNT_CODES = frozenset(
    {"10009", "10010", "10038", "10039", "20001", "20002", "20008"}
    | {"20012", "20013", "20014", "20015", "20016", "20017", "20100"}
)
# By these the fax was not taken. 408, 409, 5xx and all others leave it open.
_REFUSALS = frozenset({400, 401, 402, 403, 404, 405, 413, 415, 422})
_FIELDS = ("connection_id", "from", "to", "contents")  # the one that concerns most faxes comes first
_FIELD_OF_CODE = {"10002": "to", "10016": "to", "10017": "from"}
_NAMED_IN_TEXT = re.compile(r"[`'\"](connection_id|from|to|contents)[`'\"]|\b(connection_id|contents)\b")

# Rows of `reasons`: the nearest that there are.
_ACCOUNT_BAD = "account_disabled"
_NOT_SET_UP = "no_outbound_profile"
_SENDER_BAD = "unverified_origination_number"
_NUMBER_BAD = "number_refused"
_DOCUMENT_BAD = "document_refused"

_LONGEST_WAIT = 3600.0
_SANE_WAIT = 86400.0
_HTTP_DATE = re.compile(r"[A-Z][a-z]{2}, [0-9]{2} [A-Z][a-z]{2} [0-9]{4} [0-9]{2}:[0-9]{2}:[0-9]{2} GMT")


# --- words -------------------------------------------------------------------------------------------------


def read_json(raw: bytes) -> Any:
    """Parse JSON strictly: UTF-8, no member twice, no NaN, no half surrogate pair (RFC 8259, RFC 7493).

    Raises ValueError, and nothing else.
    """
    try:
        text = raw.decode()
        value = json.loads(text, object_pairs_hook=_members, parse_constant=_no_constant)
        if "\\u" in text:  # only an escape can bring in half a pair
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a member stands twice in one object")
    return members


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is not JSON")


def read_text(value: object, longest: int = _LONGEST_TEXT) -> str:
    """Return printable text of at most `longest` characters; "" for anything that is not text."""
    if not isinstance(value, str):
        return ""
    return "".join(char for char in value[: 4 * longest] if char.isprintable()).strip()[:longest]


def read_fax_id(value: object) -> str | None:
    """Return a carrier's id (a UUID so far); None for what could not be one segment of a path."""
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.:~-]{0,99}", value):
        return value
    return None


def read_connection(value: object) -> str:
    """Return a connection's id as text, also from a JSON number; "" when there is none."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else read_text(value)


def read_number(value: object) -> str:
    """Return a telephone number as E.164, also where its + was lost or it was written for people.

    Anything else, a SIP address for one, comes back as it was. "" for anything that is not text.
    """
    text = read_text(value)
    bare = re.sub(r"[ ().-]", "", text)
    whole = "+" + bare.removeprefix("+")
    return whole if _E164.fullmatch(whole) else text


def read_count(value: object) -> int | None:
    """Return a number of pages, seconds or rows, also from a numeric string; None for none that is sane."""
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,7}", value):
        value = int(value)
    if isinstance(value, float) and math.isfinite(value):
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST:
        return value
    return None


def read_moment(value: object) -> float | None:
    """Return an ISO 8601 time as epoch seconds, UTC where it names no zone; None when it is unreadable."""
    try:
        moment = datetime.fromisoformat(read_text(value))
    except ValueError:
        return None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def read_report(stage: Stage, fax: Mapping[str, Any], *, asked: bool) -> Report:
    """Return what a fax object or an event's payload says beside its stage."""
    return Report(
        stage=stage,
        asked=asked,
        pages=read_count(fax.get("page_count")),
        duration=read_count(fax.get("call_duration_secs")),
        reason=read_text(fax.get("failure_reason"), LONGEST_NAME) or None,
        internal_reason=read_text(fax.get("internal_failure_reason")) or None,
    )


def stage_of(status: str) -> Stage:
    """Return the stage of a fax object's `status`; both `sending` and `sending.started` were seen."""
    return Stage.SENDING if status.startswith("sending") else _STATUS.get(status, Stage.UNKNOWN)


def read_row(row: object) -> tuple[str, Sighting | None]:
    """Return a list row's id, and its fax if it is outbound. Raises Unavailable when it cannot be read.

    A row that was passed over for being odd could be the very fax that is in doubt.
    """
    unreadable = Unavailable("list holds an unreadable row")
    if not isinstance(row, dict):
        raise unreadable
    carrier_id, direction = read_fax_id(row.get("id")), row.get("direction")
    if carrier_id is None or not isinstance(direction, str):
        raise unreadable
    if direction != "outbound":
        return carrier_id, None
    to_number, from_number = read_number(row.get("to")), read_number(row.get("from"))
    connection_id, created_at = read_connection(row.get("connection_id")), read_moment(row.get("created_at"))
    callable_to = _E164.fullmatch(to_number) or to_number.startswith(("sip:", "sips:"))
    if not callable_to or not _E164.fullmatch(from_number) or not connection_id or created_at is None:
        raise unreadable
    return carrier_id, Sighting(carrier_id, to_number, from_number, connection_id, created_at)


# --- answers -----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Answer:
    """What came back over HTTP, as far as it came."""

    status: int = 0  # 0: nothing came
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytearray = field(default_factory=bytearray, repr=False)

    @property
    def succeeded(self) -> bool:
        """Whether the status is a 2xx."""
        return HTTPStatus.OK <= self.status < HTTPStatus.MULTIPLE_CHOICES

    def members(self) -> dict[str, Any]:
        """Return the JSON object in the body; {} when there is none to be read."""
        try:
            value = read_json(bytes(self.body))
        except ValueError:
            return {}
        return value if isinstance(value, dict) else {}


def read_taken(answer: Answer, now: float) -> str:
    """Return the id under which a POST's answer says the fax was taken.

    Any 2xx with an id will do: 202 is documented, an older page says 200. Raises Refused, Unavailable
    or InDoubt.
    """
    cause = f"HTTP {answer.status}"
    if answer.succeeded:
        data = answer.members().get("data")
        carrier_id = read_fax_id(data.get("id")) if isinstance(data, dict) else None
        if carrier_id is None:
            raise InDoubt(f"{cause} without a fax id")
        return carrier_id
    if HTTPStatus.MULTIPLE_CHOICES <= answer.status < HTTPStatus.BAD_REQUEST:
        raise Refused(f"{cause} redirect", Blame.ACCOUNT, _NOT_SET_UP)
    if answer.status == HTTPStatus.TOO_MANY_REQUESTS:
        raise Unavailable(cause, retry_after(answer.headers, now))
    if answer.status not in _REFUSALS:
        raise InDoubt(cause)
    raise refusal(answer)


def refusal(answer: Answer) -> Refused:
    """Return whom a refusal concerns, by its status, Telnyx's codes and the field that it names."""
    codes, named = _read_errors(answer)
    fault = next((name for name in _FIELDS if name in named), None)
    parts = [f"HTTP {answer.status}", *codes[:1], *([f"/{fault}"] if fault else [])]
    return Refused(" ".join(parts), *_blame(answer.status, codes, fault))


def _blame(status: int, codes: list[str], fault: str | None) -> tuple[Blame, str]:
    # Which status comes with an account's code is documented nowhere, so the code alone decides.
    if status == HTTPStatus.UNAUTHORIZED or not _ACCOUNT_CODES.isdisjoint(codes):
        return Blame.ACCOUNT, _ACCOUNT_BAD
    match status, fault:
        case ((402 | 403), _):
            return Blame.SUSPECT, _ACCOUNT_BAD
        case (404, _) | (400 | 422, "connection_id"):
            return Blame.SUSPECT, _NOT_SET_UP
        case ((400 | 422), "from"):
            return Blame.SUSPECT, _SENDER_BAD
        case ((400 | 422), "to"):
            return Blame.FAX, _NUMBER_BAD
    return Blame.FAX, _DOCUMENT_BAD


def _read_errors(answer: Answer) -> tuple[list[str], set[str]]:
    """Return the codes of an error body, without those that repeat the status, and the fields it names."""
    codes: list[str] = []
    named: set[str] = set()
    errors = answer.members().get("errors")
    for error in errors if isinstance(errors, list) else ():
        if not isinstance(error, dict):
            continue
        code = str(error.get("code"))
        if re.fullmatch(r"[0-9]{3,6}", code) and code != str(answer.status):
            codes.append(code)
        named |= _fields(error)
    return codes, named or {_FIELD_OF_CODE[code] for code in codes if code in _FIELD_OF_CODE}


def _fields(error: Mapping[str, Any]) -> set[str]:
    """Return the fields that one error names: in its pointer or parameter, else quoted in its text."""
    source = error.get("source")
    if isinstance(source, dict):
        where = f"{read_text(source.get('pointer'))} {read_text(source.get('parameter'))}"
        if found := set(_FIELDS).intersection(re.split(r"[^a-z0-9_]+", where)):
            return found
    text = f"{read_text(error.get('title'))} {read_text(error.get('detail'))}"
    return {quoted or bare for quoted, bare in _NAMED_IN_TEXT.findall(text)}


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Return the seconds that a 429 asks for, at most an hour; None when it names no sane ones.

    `Retry-After` (RFC 9110, 10.2.3: seconds or a date), else Telnyx's `x-ratelimit-reset` (seconds).
    """
    for name in ("Retry-After", "x-ratelimit-reset"):
        wait = _read_wait(read_text(headers.get(name)), now)
        if wait is not None and wait <= _SANE_WAIT:
            return min(wait, _LONGEST_WAIT)
    return None


def _read_wait(value: str, now: float) -> float | None:
    if re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,9})?", value):
        return float(value)
    date = read_date(value)
    return None if date is None else max(0.0, date - now)


def read_date(value: str) -> float | None:
    """Return an HTTP date (RFC 9110, 5.6.7) as epoch seconds; None when it is unreadable."""
    if not _HTTP_DATE.fullmatch(value):
        return None
    try:
        return parsedate_to_datetime(value).timestamp()
    except ValueError:  # the thirtieth of February
        return None


def unanswered(answer: Answer, now: float) -> Unavailable:
    """Return the error for a question that got an answer of no use."""
    limited = answer.status == HTTPStatus.TOO_MANY_REQUESTS
    return Unavailable(f"HTTP {answer.status}", retry_after(answer.headers, now) if limited else None)
