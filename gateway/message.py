"""Read one received mail: which PDFs it wants faxed, or why it is refused.

In charge of everything between the bytes after DATA and the PDFs in them: the limits that keep a hostile mail
from costing more than it should, the mails nobody could be told the outcome of, and the rule which part of a
mail is a document, which is passed over (text, signatures, a logo the HTML shows) and which refuses the mail.

Promises: `parse` is pure and never opens a URL. No attachment is left out in silence.

Fails: `MailRefused`, and nothing else, for any bytes whatever (except `MemoryError`, the process's trouble
and not the mail's).
"""

import hashlib
import html
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from email.errors import MessageError
from email.header import decode_header, make_header
from email.message import Message
from email.parser import BytesParser
from email.policy import Compat32, Policy
from typing import cast
from urllib.parse import unquote

from gateway.message_bodies import LARGE, Bodies, Part

MAX_HEAD = 100 * 1024
"""Octets in the header block of a mail; Postfix's `header_size_limit`."""
MAX_HEAD_LINES = 1000
MAX_DEPTH = 100
"""Levels of nesting; Postfix's `mime_nesting_limit`."""
MAX_PARTS = 1000
"""Parts of a mail, the mail itself and those that only hold others included."""
MAX_HOPS = 50
"""Received fields before a mail counts as looping (RFC 5321 section 6.3 asks for a large number)."""
MAX_ORIGINAL_HEADERS = 16 * 1024
MAX_TEXT = 250
"""Characters kept of a subject or message identifier."""

# Every field of every part together, and one field that has parameters: the standard parser's time grows with
# the square of the latter. The longest real file name (255 characters, RFC 2231) needs about 2.5 KB.
_MAX_FIELDS = 1024 * 1024
_MAX_CONTENT_FIELD = 8 * 1024
_MAX_REFERENCES = 20

_PDF_TYPES = frozenset({"application/pdf", "application/x-pdf", "application/acrobat", "text/pdf"})
_BODY_TYPES = frozenset({"text/plain", "text/html", "text/enriched", "text/x-amp-html"})
_PASSED_OVER_TYPES = frozenset(
    {
        "application/pkcs7-signature",
        "application/x-pkcs7-signature",
        "application/pgp-signature",
        "application/pgp-keys",
        "text/vcard",
        "text/x-vcard",
    }
)
_PASSED_OVER_NAMES = (".p7s", ".asc", ".vcf")
_SMIME_TYPES = frozenset({"application/pkcs7-mime", "application/x-pkcs7-mime"})
_SMIME_NAMES = (".p7m", ".p7c")
_PGP_NAMES = (".pgp", ".gpg")
_TNEF_TYPES = frozenset({"application/ms-tnef", "application/vnd.ms-tnef"})
# Exchange turns the text that follows an attachment into files of these names.
_EXCHANGE_TEXT = re.compile(r"att\d{5}\.(txt|html?)")

_END_OF_HEAD = re.compile(rb"\r?\n\r?\n")
_MESSAGE_ID = re.compile(r"<[!-;=?-~]{1,248}>")
_CID = re.compile(rb"""cid:([^"'<>\s)]{1,998})""", re.IGNORECASE)
_MEDIA_TYPE = re.compile(r"[a-z]{1,20}/[a-z0-9.+-]{1,60}")

# What the standard parser is known to raise on hostile mail: ValueError for an encoded line end in a field
# (3.11.7), RecursionError for deep nesting, and more. MemoryError is left out on purpose.
_PARSER_FAULTS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MessageError,
    RecursionError,
    TypeError,
    ValueError,
)


class MailRefused(Exception):
    """The mail cannot be faxed, and its sender can do something about it.

    `code` is the SMTP reply code (RFC 5321 section 4.2), `status` the enhanced status code (RFC 3463), `text`
    one line of printable ASCII of at most 400 characters for the sender, `log` a phrase for the log without
    content and without file names.
    """

    def __init__(self, code: int, status: str, text: str, log: str) -> None:
        super().__init__(f"{code} {status} {log}")
        self.code = code
        self.status = status
        self.text = printable(text, 400)
        self.log = log


@dataclass(frozen=True, slots=True)
class Attachment:
    """One PDF as it was received, and the hexadecimal SHA-256 of exactly these octets.

    `name` is for people only: cleaned, cut, never a path.
    """

    name: str
    data: bytes
    sha256: str


@dataclass(frozen=True, slots=True)
class Mail:
    """What a mail asks for.

    `message_id` and `references` are printable ASCII, fit for In-Reply-To and References (RFC 5322 section
    3.6.4); `message_key` is the hexadecimal SHA-256 over the Message-ID as it was received, None if there is
    none, and tells apart what looks alike in `message_id`; `subject` is decoded, on one line, at most 250
    characters; `original_headers` is the header block as received, cut at a line's end at 16 KB; `digest` is
    the hexadecimal SHA-256 over those of the received attachments, one after the other.
    """

    message_id: str | None
    message_key: str | None
    subject: str
    references: str
    original_headers: bytes
    attachments: tuple[Attachment, ...]
    digest: str


def parse(raw: bytes, large: int = LARGE) -> Mail:
    """Return what the mail `raw` (RFC 5322; lines end in CR LF or LF) asks for, or raise MailRefused.

    `large`: the octets from which on a body goes past the standard parser; the outcome does not depend on it.
    """
    try:
        head = _head(raw)
        bodies = Bodies(raw, large)
        parser = BytesParser(policy=_Bounded(_Budget(bodies)))
        message = cast("Part", parser.parsebytes(bodies.rest))  # the budget makes no other
        _refuse_automatic(message)
        attachments = _attachments(message)
        return Mail(
            message_id=_message_id(message),
            message_key=_message_key(message),
            subject=cleaned(_decoded_words(_field(message, "subject") or ""), MAX_TEXT),
            references=_references(message),
            original_headers=_cut_at_line(head),
            attachments=attachments,
            digest=_digest(attachments),
        )
    except _PARSER_FAULTS as fault:
        raise _unreadable(f"parser fault {type(fault).__name__}") from fault


def cleaned(text: str, limit: int) -> str:
    """Return `text` on one line of at most `limit` characters, without control and invisible characters."""
    seen = []
    for character in text[: 8 * limit]:
        category = unicodedata.category(character)
        if category != "Cf":
            seen.append(" " if category[0] in "CZ" else character)
    line = " ".join("".join(seen).split())
    return line if len(line) <= limit else line[: limit - 3].rstrip() + "..."


def printable(text: str, limit: int) -> str:
    """Return `text` cleaned and in ASCII: accents dropped, everything else that is not ASCII shown as `?`.

    An SMTP reply may hold other characters only for a client that asked for SMTPUTF8 (RFC 6531 section 3.5).
    """
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return cleaned(plain, limit).encode("ascii", "replace").decode("ascii")


def quoted(name: str) -> str:
    """Return a file name as refusals show it: in quotation marks, at most 60 characters."""
    return f'"{printable(name, 60)}"'


# Limits ------------------------------------------------------------


class _Budget:
    """Counts what the parser meets, and refuses the mail as soon as it is too much."""

    def __init__(self, bodies: Bodies) -> None:
        self._bodies = bodies
        self._parts = 0
        self._octets = 0

    def part(self, policy: "Policy[Message]") -> Part:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise _unreadable("too many parts")
        return Part(policy, self._bodies)

    def field(self, lines: list[str]) -> None:
        size = sum(map(len, lines))
        self._octets += size
        has_parameters = lines[0][:8].lower() == "content-"
        if self._octets > _MAX_FIELDS or (has_parameters and size > _MAX_CONTENT_FIELD):
            raise _unreadable("header fields too long")


class _Bounded(Compat32):
    """The policy that reads no field before it is asked for, tied to a budget.

    The parser calls `header_source_parse` for each field and `message_factory` for each part as it meets them
    (Python's documentation of `email.policy`), so a bomb is refused while it is being read.
    """

    _budget: _Budget

    def __init__(self, budget: _Budget) -> None:
        super().__init__(message_factory=budget.part)
        self.__dict__["_budget"] = budget  # the way round the guard of what every policy has

    def header_source_parse(self, sourcelines: list[str]) -> tuple[str, str]:
        self._budget.field(sourcelines)
        return super().header_source_parse(sourcelines)


def _head(raw: bytes) -> bytes:
    """Return the header block, or refuse one that is too long before the parser sees it."""
    if raw.startswith((b"\n", b"\r\n")):
        return b""
    end = _END_OF_HEAD.search(raw, 0, MAX_HEAD + 4)
    if end is None and len(raw) > MAX_HEAD:
        raise _unreadable("header block too long")
    head = raw[: end.start()] + b"\r\n" if end else raw
    if head.count(b"\n") > MAX_HEAD_LINES:
        raise _unreadable("too many header lines")
    return head


def _unreadable(why: str) -> MailRefused:
    return MailRefused(
        554,
        "5.6.0",
        "The mail cannot be read: its structure is damaged or far too large.",
        f"mail unreadable: {why}",
    )


# Fields ------------------------------------------------------------


def _refuse_automatic(message: Message) -> None:
    """Refuse loops, and mail to whose sender nobody could report (RFC 3834, RFC 2369, RFC 6522)."""
    hops = 0
    automatic = message.get_content_type() == "multipart/report"
    for name, value in message.raw_items():
        field = name.lower()
        word = value.strip().lower()
        hops += field == "received"
        automatic |= (
            field.startswith("list-")
            or (field == "auto-submitted" and word.startswith("auto-replied"))
            or (field == "precedence" and word in {"bulk", "list", "junk"})
        )
    if hops > MAX_HOPS:
        raise MailRefused(
            554,
            "5.4.6",
            "The mail has passed through too many systems: it seems to go in circles.",
            "mail loop",
        )
    if automatic:
        raise MailRefused(
            550,
            "5.7.1",
            "Automatic replies, reports and list mail are not faxed: nobody could be told the outcome.",
            "automatic mail",
        )


def _field(message: Message, name: str) -> str | None:
    """Return the first field of that name, its octets beyond ASCII read as UTF-8 (RFC 6532)."""
    for field, value in message.raw_items():
        if field.lower() == name:
            text: str = value[:4000]
            return text.encode("ascii", "surrogateescape").decode("utf-8", "replace")
    return None


def _decoded_words(text: str) -> str:
    """Return `text` with its encoded words (RFC 2047) decoded, or as it is if they are broken."""
    try:
        return str(make_header(decode_header(text)))
    except (LookupError, MessageError, ValueError):
        return text


def _message_id(message: Message) -> str | None:
    value = _field(message, "message-id") or ""
    found = _MESSAGE_ID.search(value)
    return found[0] if found else printable(value, MAX_TEXT) or None


def _message_key(message: Message) -> str | None:
    """Return the digest over the Message-ID as received; None if there is none, or only empty ones.

    Only what a relay may change is left out: where the line is folded, and blanks around the value (RFC 5322
    sections 2.2.3 and 3.6.4). Of several fields, which the standard forbids, all count, in their order.
    """
    values = [
        # The parser keeps every line end, and every line but the first begins with the fold's blank.
        value.encode("ascii", "surrogateescape").replace(b"\r", b"").replace(b"\n", b"").strip(b" \t")
        for field, value in message.raw_items()
        if field.lower() == "message-id"
    ]
    given = b"\r\n".join(filter(None, values))  # no value holds a line end: no two lists read alike
    return hashlib.sha256(given).hexdigest() if given else None


def _references(message: Message) -> str:
    value = _field(message, "references") or _field(message, "in-reply-to") or ""
    return " ".join(_MESSAGE_ID.findall(value)[-_MAX_REFERENCES:])


def _cut_at_line(head: bytes) -> bytes:
    if len(head) <= MAX_ORIGINAL_HEADERS:
        return head
    return head[: head.rfind(b"\n", 0, MAX_ORIGINAL_HEADERS) + 1]


# Parts ------------------------------------------------------------


def _attachments(message: Part) -> tuple[Attachment, ...]:
    leaves = list(_leaves(message))
    shown = _shown_by_html(leaves)
    found = [document for leaf in leaves if (document := _document(leaf, shown))]
    if not found:
        raise MailRefused(
            554, "5.6.1", "The mail holds no PDF: attach the document as a PDF and send it again.", "no PDF"
        )
    return tuple(found)


def _leaves(message: Part) -> Iterator[Part]:
    """Yield the parts that hold content, in a reader's order; a forwarded mail counts as one of them."""
    waiting = [(message, 1)]
    while waiting:
        part, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise _unreadable("nested too deeply")
        if part.get_content_maintype() != "multipart":
            yield part
            continue
        if part.get_content_subtype() == "encrypted":
            raise _encrypted("The mail")
        inner = part.get_payload()
        if not isinstance(inner, list):  # no boundary was found: whatever it held would be missed
            raise _unreadable("multipart without parts")
        waiting.extend((child, depth + 1) for child in reversed(inner) if isinstance(child, Part))


def _shown_by_html(leaves: list[Part]) -> set[str]:
    """Return the Content-IDs of the pictures that the mail's HTML shows (RFC 2392)."""
    shown: set[str] = set()
    for leaf in leaves:
        if leaf.get_content_type() == "text/html":
            for cid in _CID.findall(leaf.content() or b""):
                shown.add(unquote(html.unescape(cid.decode("latin-1"))))
    return shown


def _document(part: Part, shown: set[str]) -> Attachment | None:
    """Return the PDF this part holds, None if the part is passed over, or refuse the mail."""
    kind = part.get_content_type()
    name = cleaned(_decoded_words(part.get_filename() or ""), MAX_TEXT)
    called = f"The attachment {quoted(name)}" if name else "An attachment without a name"
    _refuse_wrapped(part, kind, name, called)
    data = part.content()
    declared = kind in _PDF_TYPES or name.lower().endswith(".pdf")
    if data is not None and (data.startswith(b"%PDF") or (declared and b"%PDF-" in data[:1024])):
        return Attachment(name or "document.pdf", data, hashlib.sha256(data).hexdigest())
    if not declared and _passed_over(part, kind, name.lower(), shown):
        return None
    if data is None:
        raise MailRefused(
            554,
            "5.6.0",
            f"{called} arrived damaged: send it again.",
            "attachment with broken transfer encoding",
        )
    if not data:
        raise MailRefused(554, "5.6.0", f"{called} is empty.", "empty attachment")
    if declared:
        raise MailRefused(
            554,
            "5.6.0",
            f"{called} is not a PDF, though it is marked as one.",
            "attachment is not the PDF it claims",
        )
    shown_kind = kind if _MEDIA_TYPE.fullmatch(kind) else "unknown"
    raise MailRefused(
        554,
        "5.6.1",
        f"{called} cannot be faxed, so nothing was: save it as a PDF, or leave it out.",
        f"attachment is not a PDF but {shown_kind}",
    )


def _refuse_wrapped(part: Part, kind: str, name: str, called: str) -> None:
    """Refuse what hides its documents inside another format."""
    if kind.startswith("message/"):
        inner = f" {quoted(name)}" if name else ""
        raise MailRefused(
            554,
            "5.6.1",
            f"The attached mail{inner} ({printable(kind, 40)}) cannot be faxed: attach the PDF itself.",
            "attachment is a mail",
        )
    lower = name.lower()
    if kind in _TNEF_TYPES or lower == "winmail.dat":
        raise MailRefused(
            554,
            "5.6.1",
            'The mail is in Outlook\'s own format ("winmail.dat"): send it as HTML or plain text.',
            "attachment is TNEF",
        )
    if kind in _SMIME_TYPES or lower.endswith(_SMIME_NAMES + _PGP_NAMES):
        raise _encrypted(called)
    if lower.endswith(".asc") and b"BEGIN PGP MESSAGE" in (part.content() or b"")[:4096]:
        raise _encrypted(called)


def _encrypted(called: str) -> MailRefused:
    return MailRefused(
        554,
        "5.6.1",
        f"{called} is encrypted, or signed in a way that hides it: send the PDF as a plain attachment.",
        "encrypted or opaque signed mail",
    )


def _passed_over(part: Message, kind: str, name: str, shown: set[str]) -> bool:
    """Whether a part that is no PDF is the mail's text and dress, so that nobody misses it on the fax."""
    if kind in _PASSED_OVER_TYPES or name.endswith(_PASSED_OVER_NAMES):
        return True
    if kind in _BODY_TYPES:
        attached = name or part.get_content_disposition() == "attachment"
        return not attached or bool(_EXCHANGE_TEXT.fullmatch(name))
    content_id = str(part.get("content-id", "")).strip().strip("<>")
    return kind.startswith("image/") and content_id in shown


def _digest(attachments: tuple[Attachment, ...]) -> str:
    # All are of one length, so no two lists of attachments read alike; and each document is hashed once.
    return hashlib.sha256("".join(each.sha256 for each in attachments).encode()).hexdigest()
