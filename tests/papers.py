"""Sample PDFs and mails, good and bad, for the tests."""

import base64
import io
import os
from typing import Any

import pikepdf
import pypdfium2
import pytest
from pikepdf import Array, Dictionary, Name

from gateway.message import MailRefused, parse

CRLF = b"\r\n"


# PDFs


def blank(pages: int, size: tuple[int, int] = (612, 792), text: str = "page") -> pikepdf.Pdf:
    """Return an open PDF whose n-th page says "`text` n"."""
    pdf = pikepdf.new()
    font = pdf.make_indirect(Dictionary(Type=Name.Font, Subtype=Name.Type1, BaseFont=Name.Helvetica))
    for number in range(1, pages + 1):
        page = pdf.add_blank_page(page_size=size)
        page.obj.Contents = pdf.make_stream(f"BT /F1 24 Tf 72 72 Td ({text} {number}) Tj ET".encode())
        page.obj.Resources = Dictionary(Font=Dictionary(F1=font))
    return pdf


def saved(pdf: pikepdf.Pdf, **how: Any) -> bytes:
    """Return an open PDF as octets, its objects readable and the same every time."""
    out = io.BytesIO()
    how = {"object_stream_mode": pikepdf.ObjectStreamMode.disable, "static_id": True} | how
    pdf.save(out, **how)
    return out.getvalue()


def paper(pages: int = 1, *, size: tuple[int, int] = (612, 792), text: str = "page") -> bytes:
    """Return a healthy PDF whose n-th page says "`text` n"."""
    return saved(blank(pages, size, text))


def heavy(octets: int) -> bytes:
    """Return a one-page PDF that holds so many octets which nobody can compress, and little else."""
    pdf = blank(1)
    pdf.pages[0].obj.Noise = pdf.make_stream(os.urandom(octets))
    return saved(pdf, compress_streams=False, stream_decode_level=pikepdf.StreamDecodeLevel.none)


def locked(user: str = "", owner: str = "owner", pages: int = 1) -> bytes:
    """Return an encrypted PDF; without a user password anybody can read it."""
    return saved(blank(pages), static_id=False, encryption=pikepdf.Encryption(user=user, owner=owner))


def written(*objects: bytes) -> bytes:
    """Return a PDF of these objects, numbered from 1 (the catalog), as a careless program would."""
    out, places = b"%PDF-1.4\n", []
    for number, item in enumerate(objects, 1):
        places.append(len(out))
        out += b"%d 0 obj\n%b\nendobj\n" % (number, item)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    size = len(objects) + 1
    return (
        out
        + b"xref\n0 %d\n0000000000 65535 f \n" % size
        + table
        + b"trailer << /Root 1 0 R /Size %d >>\nstartxref\n%d\n%%%%EOF\n" % (size, len(out))
    )


def stream(content: bytes, entries: bytes = b"") -> bytes:
    """Return a stream object for `written`."""
    return b"<< /Length %d %b >>\nstream\n%b\nendstream" % (len(content), entries, content)


def million_pages() -> bytes:
    """Return 1 KB that claims a million pages by sharing one branch of its page tree over and over."""
    levels = [
        b"<< /Type /Pages /Count %d /Kids [%b] >>"
        % (10 ** (6 - level), b" ".join([b"%d 0 R" % (level + 3)] * 10))
        for level in range(6)
    ]
    page = b"<< /Type /Page /MediaBox [0 0 612 792] /Resources << >> >>"
    return written(b"<< /Type /Catalog /Pages 2 0 R >>", *levels, page)


def forms_calling_forms(depth: int = 8, width: int = 12) -> bytes:
    """Return a small PDF whose page draws a form that draws others, and so on."""
    forms = []
    for level in range(depth):
        child = 5 + level
        last = level == depth - 1
        draw = b"0 0 1 1 re f" if last else b"/X Do " * width
        entries = b"/Type /XObject /Subtype /Form /BBox [0 0 600 700]"
        if not last:
            entries += b" /Resources << /XObject << /X %d 0 R >> >>" % (child + 1)
        forms.append(stream(draw, entries))
    return written(
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Count 1 /Kids [3 0 R] >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R"
        b" /Resources << /XObject << /X 5 0 R >> >> >>",
        stream(b"/X Do"),
        *forms,
    )


def filled_form(name: str, value: str) -> bytes:
    """Return a one-page form with one field filled in."""
    pdf = blank(1)
    page = pdf.pages[0].obj
    field = pdf.make_indirect(
        Dictionary(
            Type=Name.Annot,
            Subtype=Name.Widget,
            FT=Name.Tx,
            T=name,
            V=value,
            DA="/Helv 12 Tf 0 g",
            Rect=Array([72, 400, 500, 460]),
            P=page,
        )
    )
    page.Annots = Array([field])
    font = Dictionary(Type=Name.Font, Subtype=Name.Type1, BaseFont=Name.Helvetica)
    pdf.Root.AcroForm = Dictionary(
        Fields=Array([field]), NeedAppearances=True, DR=Dictionary(Font=Dictionary(Helv=font))
    )
    return saved(pdf)


def page_texts(data: bytes) -> list[str]:
    """Return what each page of a PDF says."""
    pdf = pypdfium2.PdfDocument(data)  # type: ignore[no-untyped-call]  # the package ships no types
    try:
        return [str(page.get_textpage().get_text_range()) for page in pdf]
    finally:
        pdf.close()  # type: ignore[no-untyped-call]  # as above


# Mails


def part(
    data: bytes,
    kind: str = "application/pdf",
    name: str | None = "paper.pdf",
    *,
    disposition: str | None = "attachment",
    encoding: str = "base64",
    fields: tuple[str, ...] = (),
) -> bytes:
    """Return one part of a mail: header fields, an empty line, the encoded data."""
    head = [f"Content-Type: {kind}", f"Content-Transfer-Encoding: {encoding}", *fields]
    if disposition:
        head.append(f"Content-Disposition: {disposition}" + (f'; filename="{name}"' if name else ""))
    elif name:
        head[0] += f'; name="{name}"'
    body = base64.encodebytes(data).replace(b"\n", CRLF) if encoding == "base64" else data
    return "\r\n".join(head).encode("utf-8") + CRLF * 2 + body


def text(words: str = "Please fax this.", kind: str = "text/plain") -> bytes:
    """Return a part of readable text."""
    return part(words.encode(), f"{kind}; charset=utf-8", None, disposition=None, encoding="8bit")


def multipart(*parts: bytes, kind: str = "multipart/mixed", boundary: str = "=_limit") -> bytes:
    """Return a part that holds others."""
    line = b"--" + boundary.encode()
    body = b"".join(line + CRLF + one + CRLF for one in parts)
    return f'Content-Type: {kind}; boundary="{boundary}"'.encode() + CRLF * 2 + body + line + b"--" + CRLF


def mail(content: bytes, *fields: str) -> bytes:
    """Return a whole mail: a usual header, further fields, and the content, which is a part."""
    usual = (
        "Received: from scanner by mail.example.com; Fri, 20 Nov 2026 09:00:00 +0000",
        "From: Clerk <clerk@example.com>",
        "To: +13125550123@fax.local",
        "Subject: Order 4711",
        "Date: Fri, 20 Nov 2026 09:00:00 +0000",
        "Message-ID: <order-4711@example.com>",
        "MIME-Version: 1.0",
    )
    return "\r\n".join((*usual, *fields)).encode("utf-8", "surrogateescape") + CRLF + content


def mail_of(*documents: bytes) -> bytes:
    """Return the usual mail: a line of text and one PDF or several."""
    return mail(multipart(text(), *(part(data, name=f"paper{n}.pdf") for n, data in enumerate(documents, 1))))


def refusal(raw: bytes) -> MailRefused:
    """Return the refusal of a mail; fail if it is taken, or if the answer would not fit an SMTP reply."""
    with pytest.raises(MailRefused) as caught:
        parse(raw)
    answer = caught.value
    assert answer.text.isascii()
    assert answer.text.isprintable()
    assert len(answer.text) <= 400
    return answer
