"""Requests to the sandbox carrier: reading them as strictly as Telnyx is known to, and the errors they earn.

In charge of: the multipart form of `POST /v2/faxes`, the filters and pages of `GET /v2/faxes`, error bodies.
Promises: a form is taken only if Telnyx's schema `SendFaxMultipartRequest` allows it; every fault of a form
is named in one answer; of a document no more than its allowed size is held in memory.
Fails: `RequestError`, which carries the answer's status and its `errors`.

Stricter than Telnyx is known to be: unknown or repeated fields, unknown query parameters and SIP addresses
are refused, so that a slip of the pen in a client shows here and not on the bill.
"""

import hashlib
import io
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pikepdf
from aiohttp import BodyPartReader, web
from multidict import MultiMapping

from gateway.sandbox_script import E164

MAX_DOCUMENT = 20_000_000  # "20 MB" in the schema of `contents`; read as decimal, the smaller of the two
MAX_TEXT = 4096
QUALITIES = ("normal", "high", "very_high", "ultra_light", "ultra_dark")
SWITCHES = ("t38_enabled", "monochrome", "store_media", "store_preview")
REQUIRED = ("connection_id", "to", "from")
PAGE_SIZE, MAX_PAGE_SIZE = 20, 250  # as Telnyx's other lists; for faxes no value is published

Error = dict[str, Any]


class RequestError(Exception):
    """A request is refused with this HTTP status and these members of `errors`."""

    def __init__(self, status: int, *errors: Error) -> None:
        super().__init__(status, *errors)
        self.status = status
        self.errors = errors

    def response(self) -> web.Response:
        """Make the answer in the shape of Telnyx's `GenericErrorResponse`."""
        return web.json_response({"errors": list(self.errors)}, status=self.status)


def error(code: str, title: str, detail: str, *, pointer: str = "", parameter: str = "") -> Error:
    """Make one member of `errors`; `pointer` names a field of the body, `parameter` one of the query."""
    made: Error = {"code": code, "title": title, "detail": detail}
    if pointer:
        made["source"] = {"pointer": pointer}
    if parameter:
        made["source"] = {"parameter": parameter}
    return made


def not_found() -> RequestError:
    """Make the 404 for an address or a resource that is not there."""
    return RequestError(
        404, error("10005", "Resource not found", "The requested resource or URL could not be found.")
    )


@dataclass(slots=True)
class Form:
    """A multipart body as it came: text fields, the document if there was one, how often each name came.

    `file_name` is that of the part `contents`; without one Telnyx takes the part for text and refuses it.
    """

    texts: dict[str, str] = field(default_factory=dict)
    contents: bytes | None = None
    file_name: str | None = None
    times: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class Submission:
    """A form that passed: its text fields and what is known of the document (`pages` None: not countable)."""

    fields: Mapping[str, str]
    sha256: str
    size: int
    pages: int | None
    is_pdf: bool

    @property
    def to(self) -> str:
        """The number to be dialled."""
        return self.fields["to"]

    @property
    def from_(self) -> str:
        """The number it is sent from."""
        return self.fields["from"]


async def read_form(request: web.Request) -> Form:
    """Read the body to its end. Raises `RequestError`: 415 not multipart, 400 malformed, 413 too large."""
    if request.content_type != "multipart/form-data":
        detail = "Send the fax as multipart/form-data with the document in the part contents."
        raise RequestError(415, error("10014", "Unsupported Media Type", detail))
    form = Form()
    try:
        async for part in await request.multipart():
            if not isinstance(part, BodyPartReader) or not part.name:
                raise RequestError(400, error("10015", "Bad Request", "A part of the form has no name."))
            form.times[part.name] += 1
            if part.name == "contents":
                form.file_name = part.filename
                form.contents = await _read(part, MAX_DOCUMENT)
            else:
                form.texts[part.name] = (await _read(part, MAX_TEXT)).decode()
    except ValueError as fault:  # the parser's word for a malformed body; bytes that are no UTF-8 too
        raise RequestError(400, error("10015", "Bad Request", f"The form is malformed: {fault}")) from fault
    return form


async def _read(part: BodyPartReader, limit: int) -> bytes:
    """Read a part, keeping no more than one byte beyond `limit`; the rest is read and forgotten."""
    kept = bytearray()
    while chunk := await part.read_chunk(65536):
        kept += chunk[: limit + 1 - len(kept)]
    if len(kept) > limit:
        detail = f"{part.name} is larger than {limit} bytes"
        raise RequestError(413, error("413", "Payload Too Large", detail, pointer=f"/{part.name}"))
    return bytes(kept)


def check_form(form: Form, connection_id: str, from_numbers: Collection[str]) -> Submission:
    """Hold a form against the schema and the account; `from_numbers` empty allows every sender.

    Raises `RequestError` 422 with one member for each fault.
    """
    errors = [
        error("10004", "Missing required parameter", f"{name} is required", pointer=f"/{name}")
        for name in REQUIRED
        if not form.texts.get(name)
    ]
    for name, value in form.texts.items():
        missing = not value and name in REQUIRED
        if not missing and (fault := _field_fault(name, value, connection_id, from_numbers)):
            errors.append(fault)
    errors += [
        _unprocessable(name, f"{name} is given {times} times")
        for name, times in form.times.items()
        if times > 1
    ]
    if form.contents is None:
        errors.append(
            error("10004", "Missing required parameter", "contents is required", pointer="/contents")
        )
    elif not form.file_name or not form.contents:
        errors.append(_unprocessable("contents", "contents is invalid"))
    if errors or form.contents is None:
        raise RequestError(422, *errors)
    return Submission(
        fields=form.texts,
        sha256=hashlib.sha256(form.contents).hexdigest(),
        size=len(form.contents),
        pages=_count_pages(form.contents),
        is_pdf=form.contents.startswith(b"%PDF"),
    )


def _field_fault(name: str, value: str, connection_id: str, from_numbers: Collection[str]) -> Error | None:
    """Say what is wrong with one text field, if anything is."""
    pointer = f"/{name}"
    match name:
        case "to" | "from" if not E164.fullmatch(value):
            detail = f"{name} must be in +E.164 format"
            return error("10016", "Phone number must be in +E.164 format", detail, pointer=pointer)
        case "from" if from_numbers and value not in from_numbers:
            detail = "from is not a number of this account"
            return error("10017", "Associated resource does not exist", detail, pointer=pointer)
        case "connection_id" if value != connection_id:
            detail = "connection_id is not an application of this account"
            return error("10017", "Associated resource does not exist", detail, pointer=pointer)
        case "quality" if value not in QUALITIES:
            detail = "quality must be one of " + ", ".join(QUALITIES)
            return error("10032", "Invalid enumerated value", detail, pointer=pointer)
        case switch if switch in SWITCHES and value not in ("true", "false"):
            return error(
                "10032", "Invalid enumerated value", f"{name} must be true or false", pointer=pointer
            )
        case other if other not in (*REQUIRED, "quality", *SWITCHES):
            return _unprocessable(name, f"{name} is not a field of a multipart fax")
    return None


def _unprocessable(name: str, detail: str) -> Error:
    return error("10027", "Unprocessable Entity", detail, pointer=f"/{name}")


def _count_pages(document: bytes) -> int | None:
    try:
        with pikepdf.open(io.BytesIO(document)) as pdf:
            return len(pdf.pages)
    except pikepdf.PdfError:
        return None


@dataclass(frozen=True, slots=True)
class ListQuery:
    """A question to the list: bounds on `created_at` by operator, exact values by field, and the page."""

    created_at: tuple[tuple[str, float], ...] = ()
    exact: Mapping[str, str] = field(default_factory=dict)
    page: int = 1
    size: int = PAGE_SIZE

    def selects(self, to: str, from_: str, created_at: float) -> bool:
        """Tell whether an outbound fax with these numbers, created at this epoch second, passes."""
        row = {"direction": "outbound", "to": to, "from": from_}
        if any(row[name] != value for name, value in self.exact.items()):
            return False
        compare = {
            "gte": created_at.__ge__,
            "gt": created_at.__gt__,
            "lte": created_at.__le__,
            "lt": created_at.__lt__,
        }
        return all(compare[operator](bound) for operator, bound in self.created_at)


def read_list_query(query: MultiMapping[str]) -> ListQuery:
    """Read the query of `GET /faxes`, already decoded: there a raw `+` has become a space.

    Raises `RequestError` 422 for a parameter that is not documented or cannot be read.
    """
    bounds: list[tuple[str, float]] = []
    exact: dict[str, str] = {}
    pages = {"page[number]": 1, "page[size]": PAGE_SIZE}
    for parameter, value in query.items():
        match parameter:
            case "filter[direction][eq]" | "filter[from][eq]" | "filter[to][eq]":
                exact[parameter.split("[")[1].rstrip("]")] = value
            case (
                "filter[created_at][gte]"
                | "filter[created_at][gt]"
                | "filter[created_at][lte]"
                | "filter[created_at][lt]"
            ):
                bounds.append((parameter.split("[")[2].rstrip("]"), _epoch(parameter, value)))
            case "page[number]" | "page[size]":
                pages[parameter] = _page(parameter, value)
            case _:
                raise _bad_parameter(parameter, "is not a parameter of this list")
    return ListQuery(tuple(bounds), exact, pages["page[number]"], pages["page[size]"])


def _epoch(parameter: str, value: str) -> float:
    """Read an ISO 8601 time; without a zone it is UTC."""
    try:
        moment = datetime.fromisoformat(value)
    except ValueError as fault:
        raise _bad_parameter(parameter, "is not an ISO 8601 time") from fault
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _page(parameter: str, value: str) -> int:
    limit = MAX_PAGE_SIZE if parameter == "page[size]" else 1_000_000
    if not (value.isascii() and value.isdigit() and 1 <= int(value) <= limit):
        raise _bad_parameter(parameter, f"is not a number from 1 to {limit}")
    return int(value)


def _bad_parameter(parameter: str, what: str) -> RequestError:
    return RequestError(
        422, error("10031", "Invalid request filter", f"{parameter} {what}", parameter=parameter)
    )
