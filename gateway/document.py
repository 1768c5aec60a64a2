"""Check, repair and join PDFs into the one document that is faxed, and draw its first page.

In charge of the rule that what is checked is what is sent: a healthy PDF alone in its mail is sent octet for
octet; anything that must be changed (joined, repaired, decrypted, stripped of programs) is written anew, and
the result is checked again. The page count is the one two parsers with nothing in common agree on: qpdf walks
the page tree, pdfium believes what the tree says of itself.

Promises: no network, no files, nothing in a document is run. Pages are never lost in silence: a damaged file
is repaired only if everything it refers to is still there, else it is refused by name.

Fails: `MailRefused` for whatever is wrong with a document. Hostile documents can still cost any amount of
time and memory, or end the process: callers run this in a child process with limits.
"""

import contextlib
import hashlib
import io
import re
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pikepdf
import pypdfium2
from pikepdf.exceptions import PageCopyWarning

from gateway.message import Attachment, MailRefused, quoted

PICTURE_WIDTH = 500
PICTURE_HEIGHT = 1500
"""Pixels; a page longer than three times its width is drawn narrower instead."""

# qpdf's warnings about things it puts right without loss; after any other the file is refused. First what is
# said of a file that was mangled on its way and whose table of objects must be rebuilt ...
_REBUILT = "Attempting to reconstruct cross-reference table"
_REBUILDING = (
    "file is damaged",
    "can't find startxref",
    "xref not found",
    _REBUILT,
    "unable to find trailer dictionary while recovering damaged file",
    "expected endstream",
    "attempting to recover stream length",
    r"recovered stream length: \d+",
)
# ... then the slips of careless programs, which every reader forgives. In a file that had to be rebuilt they
# may be the traces of what was lost, and are not forgiven.
_SLIPS = (
    "accepting invalid xref table entry",
    "extraneous whitespace seen before xref",
    r"reported number of objects \(\d+\) is not one plus the highest object number \(\d+\)",
    "stream keyword followed by carriage return only",
    "stream keyword followed by extraneous whitespace",
    "input stream is complete but output may still be valid",
    "last occurrence overrides earlier ones",
    "/Type key should be /Pages? but is not; overriding",
    "MediaBox is undefined; setting to letter / ANSI A",
    "Resources is missing or invalid; repairing",
    "is direct; converting to indirect",
    "appears more than once in the pages tree; creating a new page object as a copy",
)
_HARMLESS_REBUILT = re.compile(f"({'|'.join(_REBUILDING)})$")
_HARMLESS = re.compile(f"({'|'.join(_REBUILDING + _SLIPS)})$")

# What pikepdf and pypdfium2 raise on damaged files: pikepdf gives a value of the wrong type as a number or
# None, so a broken catalog shows as AttributeError or TypeError. PdfiumError is a RuntimeError.
_FAULTS = (
    pikepdf.PikepdfError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
    zlib.error,
)


@dataclass(frozen=True, slots=True)
class Document:
    """What is faxed: a PDF, its page count, and the hexadecimal SHA-256 of exactly these octets."""

    data: bytes
    pages: int
    sha256: str


class NotDrawn(ValueError):
    """The first page cannot be drawn."""


def join(attachments: Sequence[Attachment], *, max_pages: int, max_size: int) -> Document:
    """Return the attachments as one PDF of at most `max_pages` pages and `max_size` octets.

    Raises MailRefused. A document that only an owner password protects (readable, but "no printing" or "no
    changes") is accepted: its sender can read it and asked for it to be faxed. It is sent decrypted, since a
    carrier opens no protected file.
    """
    first = attachments[0]
    checked = [_checked(attachment, max_pages) for attachment in attachments]
    pages = sum(count for _, count in checked)
    if pages > max_pages:
        raise _too_many("The mail's documents together have", pages, max_pages)
    data = checked[0][0]
    if len(checked) > 1:
        try:
            with contextlib.ExitStack() as opened:
                data = _joined([opened.enter_context(pikepdf.open(io.BytesIO(part))) for part, _ in checked])
            _confirm(data, pages)
        except _FAULTS as fault:
            raise MailRefused(
                554,
                "5.6.0",
                "The attached PDFs cannot be joined into one document: print them into a single PDF.",
                f"PDFs cannot be joined: {type(fault).__name__}",
            ) from fault
    if len(data) > max_size:
        raise MailRefused(
            552,
            "5.3.4",
            f"The document has {_megabytes(len(data))}; at most {_megabytes(max_size)} can be faxed.",
            "document too large",
        )
    return Document(data, pages, first.sha256 if data is first.data else hashlib.sha256(data).hexdigest())


def first_page_picture(data: bytes) -> bytes:
    """Return the first page as a grey PNG, at most 500 pixels wide and 1500 high, or raise NotDrawn."""
    try:
        with _pdfium(data) as pdf:
            pdf.init_forms()  # else the text somebody filled in is missing
            page = pdf[0]
            width, height = page.get_size()
            scale = min(PICTURE_WIDTH / width, PICTURE_HEIGHT / height)
            # One pixel less each way: the renderer rounds up, and may meet a rounded scale.
            scale *= (PICTURE_WIDTH - 1) / PICTURE_WIDTH
            image = page.render(scale=scale, grayscale=True).to_pil()
            png = io.BytesIO()
            image.save(png, "PNG")
            return png.getvalue()
    except _FAULTS as fault:
        raise NotDrawn(type(fault).__name__) from fault


def _checked(attachment: Attachment, max_pages: int) -> tuple[bytes, int]:
    """Return one document fit to be sent and its page count."""
    called = f"The document {quoted(attachment.name)}"
    data = attachment.data
    try:
        seen = _pdfium_pages(data)
        with pikepdf.open(io.BytesIO(data)) as pdf:
            claimed = _number(pdf.Root.Pages, "/Count")
            pages = len(pdf.pages)
            _refuse_count(called, pages, max(claimed, seen), max_pages)
            _refuse_placeholder(pdf, called)
            foreign = pages != seen or not data.startswith(b"%PDF-") or pdf.is_encrypted
            stripped = _strip(pdf)
            repaired = _repaired(pdf)
            if repaired:  # only the pages are known to be sound, not what was around them
                data = _joined([pdf])
            elif foreign or stripped:
                data = _saved(pdf)
        if data is not attachment.data:
            _confirm(data, pages)
    except pikepdf.PasswordError as fault:
        raise _protected(called) from fault
    except _FAULTS as fault:
        if "encryption" in str(fault):  # a certificate, or a method nobody knows
            raise _protected(called) from fault
        raise _damaged(called, type(fault).__name__) from fault
    return data, pages


def _pdfium(data: bytes) -> Any:
    return pypdfium2.PdfDocument(data)  # type: ignore[no-untyped-call]  # the package ships no types


def _pdfium_pages(data: bytes) -> int:
    """Return the page count that pdfium believes, 0 if it cannot open the file (as one without pages)."""
    try:
        with _pdfium(data) as pdf:
            return len(pdf)
    except pypdfium2.PdfiumError:
        return 0


def _number(dictionary: pikepdf.Object, key: str) -> int:
    """Return an integer or boolean entry; 0 if it is missing or of another type."""
    value: Any = dictionary.get(key)  # the library's own types do not tell that numbers come as Python's
    return value if isinstance(value, int) else 0


def _refuse_count(called: str, pages: int, claimed: int, max_pages: int) -> None:
    if pages == claimed == 0:
        raise MailRefused(554, "5.6.0", f"{called} has no pages.", "PDF without pages")
    if pages < claimed:  # pages that were there are gone, or never were: who could tell?
        raise _damaged(called, "fewer pages than it claims")
    if pages > max_pages:
        raise _too_many(f"{called} has", pages, max_pages)


def _refuse_placeholder(pdf: pikepdf.Pdf, called: str) -> None:
    """Refuse files whose only page says that another program must show the real document."""
    root = pdf.Root
    form = root.get("/AcroForm")
    if isinstance(form, pikepdf.Dictionary) and "/XFA" in form:
        # Dynamic XFA draws its pages at run time (ISO 32000-1, 12.7.8; NeedsRendering in 7.7.2); a static one
        # has its fields and pages in the file as well.
        fields = form.get("/Fields")
        if _number(root, "/NeedsRendering") or not isinstance(fields, pikepdf.Array) or not len(fields):
            raise MailRefused(
                554,
                "5.6.1",
                f"{called} is a dynamic form that only Adobe's programs can show: print it to a PDF first.",
                "dynamic XFA form",
            )
    # Portfolios, and the cover page of a document under rights management (ISO 32000-2, 7.6.7).
    if "/Collection" in root:
        raise MailRefused(
            554,
            "5.6.1",
            f"{called} is a portfolio or wrapper around other files: attach those as PDFs instead.",
            "PDF portfolio",
        )


def _strip(pdf: pikepdf.Pdf) -> bool:
    """Take out what runs by itself and files within the file; whether there was any.

    An opening action that only goes to a page is left alone: it is common and does nothing to a fax.
    """
    root = pdf.Root
    holders: list[tuple[pikepdf.Object, tuple[str, ...]]] = [(root, ("/AA", "/AF"))]
    opening = root.get("/OpenAction")
    if isinstance(opening, pikepdf.Dictionary) and opening.get("/S") != pikepdf.Name.GoTo:
        holders.append((root, ("/OpenAction",)))
    names = root.get("/Names")
    if isinstance(names, pikepdf.Dictionary):
        holders.append((names, ("/JavaScript", "/EmbeddedFiles")))
    holders.extend((page.obj, ("/AA",)) for page in pdf.pages)
    found = [(holder, key) for holder, keys in holders for key in keys if key in holder]
    for holder, key in found:
        del holder[key]
    return bool(found)


def _repaired(pdf: pikepdf.Pdf) -> bool:
    """Whether qpdf had to put something right; raises PdfError if that may have cost content."""
    for page in pdf.pages:
        contents = page.obj.get("/Contents")
        for stream in contents if isinstance(contents, pikepdf.Array) else [contents]:
            if isinstance(stream, pikepdf.Stream):
                stream.read_bytes()  # an undecodable page would be faxed blank
    notes = pdf.get_warnings()  # asking for them also forgets them
    if not notes:
        return False
    notes += pdf.check_pdf_syntax()
    rebuilt = any(note.endswith(_REBUILT) for note in notes)
    harmless = _HARMLESS_REBUILT if rebuilt else _HARMLESS
    if not all(harmless.search(note) for note in notes):
        raise pikepdf.PdfError("damage that may have cost content")
    if rebuilt:
        _refuse_loss(pdf)
    return True


def _refuse_loss(pdf: pikepdf.Pdf) -> None:
    """Raise PdfError or zlib.error if a file whose table of objects was rebuilt lacks more than that."""
    for item in pdf.objects:
        if item is None:  # something refers to it and it is not there: the usual look of a file cut short
            raise pikepdf.PdfError("objects are missing")
        if isinstance(item, pikepdf.Stream) and item.get("/Filter") == pikepdf.Name.FlateDecode:
            zlib.decompress(item.read_raw_bytes())  # checks the sum that PDF readers ignore
    if not all("/Contents" in page.obj for page in pdf.pages):
        raise pikepdf.PdfError("the content of a page is missing")


def _joined(parts: Sequence[pikepdf.Pdf]) -> bytes:
    with pikepdf.new() as whole:
        for part in parts:
            # Unlike a plain copy of pages this carries along the forms that hold filled-in text.
            whole.add_pages_from(part)
        return _saved(whole)


def _saved(pdf: pikepdf.Pdf) -> bytes:
    """Write the document anew without encryption; the same input gives the same octets."""
    written = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PageCopyWarning)  # about forms in a viewer; a fax has none
        pdf.save(written, encryption=False, deterministic_id=True, fix_metadata_version=False)
    return written.getvalue()


def _confirm(data: bytes, pages: int) -> None:
    """Raise PdfError unless both parsers read the written file as that many pages, each of which loads."""
    with pikepdf.open(io.BytesIO(data)) as pdf:
        walked = len(pdf.pages)
        clean = not pdf.get_warnings()
    with _pdfium(data) as drawn:
        if not (clean and walked == len(drawn) == pages):
            raise pikepdf.PdfError("two parsers disagree about the written document")
        for number in range(pages):
            drawn[number].close()


def _damaged(called: str, why: str) -> MailRefused:
    return MailRefused(
        554,
        "5.6.0",
        f"{called} is damaged: send it again, or print it into a new PDF.",
        f"PDF damaged: {why}",
    )


def _protected(called: str) -> MailRefused:
    return MailRefused(
        554, "5.6.1", f"{called} is protected by a password: send it without.", "PDF protected"
    )


def _too_many(called: str, pages: int, limit: int) -> MailRefused:
    return MailRefused(
        554,
        "5.6.0",
        f"{called} {pages} pages; at most {limit} can be faxed in one call.",
        f"too many pages: {pages}",
    )


def _megabytes(size: int) -> str:
    return f"{size / 1_000_000:.1f} MB"
