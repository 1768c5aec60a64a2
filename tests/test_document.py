import hashlib
import io
import re
from collections.abc import Callable

import papers
import pikepdf
import pytest
from papers import blank, locked, page_texts, paper, saved, stream, written
from pikepdf import Array, Dictionary, Name
from PIL import Image

from gateway import document
from gateway.document import Document, NotDrawn, first_page_picture, join
from gateway.message import Attachment, MailRefused


def joined(*documents: bytes, max_pages: int = 350, max_size: int = 20_000_000) -> Document:
    """Return the documents as one, having seen that its page count and hash are true."""
    found = join(
        [
            Attachment(f"paper{n}.pdf", data, hashlib.sha256(data).hexdigest())
            for n, data in enumerate(documents, 1)
        ],
        max_pages=max_pages,
        max_size=max_size,
    )
    assert found.sha256 == hashlib.sha256(found.data).hexdigest()
    assert len(page_texts(found.data)) == found.pages
    return found


def refusal(*documents: bytes, max_pages: int = 350, max_size: int = 20_000_000) -> MailRefused:
    """Return the refusal of the documents."""
    with pytest.raises(MailRefused) as caught:
        joined(*documents, max_pages=max_pages, max_size=max_size)
    assert "paper" not in caught.value.log
    return caught.value


def changed(change: Callable[[pikepdf.Pdf], object], pages: int = 1) -> bytes:
    """Return a healthy PDF after a change to it."""
    pdf = blank(pages)
    change(pdf)
    return saved(pdf)


# One document


def test_healthy_document_is_sent_as_it_is() -> None:
    """A healthy PDF is sent octet for octet."""
    data = paper(3)
    assert joined(data) == Document(data, 3, hashlib.sha256(data).hexdigest())


def test_document_that_opens_at_a_page_is_sent_as_it_is() -> None:
    """An opening action that only goes to a page changes nothing."""
    goto = changed(
        lambda pdf: setattr(pdf.Root, "OpenAction", Dictionary(S=Name.GoTo, D=Array([0, Name.Fit])))
    )
    place = changed(lambda pdf: setattr(pdf.Root, "OpenAction", Array([pdf.pages[0].obj, Name.Fit])))
    assert (joined(goto).data, joined(place).data) == (goto, place)


def test_owner_password_alone_is_no_obstacle() -> None:
    """A PDF that anybody can read is faxed, decrypted, whatever its owner forbids."""
    found = joined(locked(pages=2))
    assert page_texts(found.data) == ["page 1", "page 2"]
    assert b"/Encrypt" not in found.data


@pytest.mark.parametrize(
    "data",
    [
        locked(user="secret"),
        re.sub(rb"/Filter /Standard", b"/Filter /Adobe.PubSec", locked()),
    ],
)
def test_password_refuses_by_name(data: bytes) -> None:
    """A PDF that needs a password, or a certificate, is refused by name."""
    answer = refusal(data)
    assert (answer.code, answer.status) == (554, "5.6.1")
    assert '"paper1.pdf" is protected' in answer.text


def test_what_runs_by_itself_is_taken_out() -> None:
    """Scripts, launch actions and files within the file are not sent on; the pages stay."""

    def arm(pdf: pikepdf.Pdf) -> None:
        script = Dictionary(S=Name.JavaScript, JS="app.alert(1)")
        pdf.Root.OpenAction = Dictionary(S=Name.Launch, F="cmd.exe")
        pdf.Root.AA = Dictionary(WC=script)
        pdf.pages[1].obj.AA = Dictionary(O=script)
        pdf.Root.Names = Dictionary(JavaScript=Dictionary(Names=Array(["x", script])))
        pdf.attachments["inner.exe"] = b"MZ inner"

    found = joined(changed(arm, pages=2))
    assert page_texts(found.data) == ["page 1", "page 2"]
    with pikepdf.open(io.BytesIO(found.data)) as pdf:
        assert not {"/OpenAction", "/AA"} & set(pdf.Root.keys())
        assert not len(pdf.attachments)
    for mark in (b"cmd.exe", b"alert", b"MZ inner", b"inner.exe"):
        assert mark not in found.data


def test_junk_before_the_header_is_cut_off() -> None:
    """Octets before %PDF are not sent on."""
    found = joined(b"@PJL JOB\r\n" + paper(2))
    assert found.data.startswith(b"%PDF-")
    assert found.pages == 2


# Placeholders


def xfa(fields: int, *, rendering: bool) -> bytes:
    """Return a form with an XFA part."""

    def add(pdf: pikepdf.Pdf) -> None:
        widgets = [pdf.make_indirect(Dictionary(FT=Name.Tx, T=f"f{n}")) for n in range(fields)]
        pdf.Root.AcroForm = Dictionary(XFA=pdf.make_stream(b"<xdp/>"), Fields=Array(widgets))
        if rendering:
            pdf.Root.NeedsRendering = True

    return changed(add)


@pytest.mark.parametrize("data", [xfa(1, rendering=True), xfa(0, rendering=False)])
def test_dynamic_form_is_refused(data: bytes) -> None:
    """A form whose file holds only "please wait" is refused, so that nobody receives that page."""
    answer = refusal(data)
    assert answer.status == "5.6.1"
    assert '"paper1.pdf" is a dynamic form' in answer.text


def test_static_form_is_sent() -> None:
    """A form that has its pages in the file is sent as it is, XFA or not."""
    data = xfa(1, rendering=False)
    assert joined(data).data == data


def test_portfolio_is_refused() -> None:
    """The cover page of a portfolio is not faxed in place of the files in it."""
    answer = refusal(changed(lambda pdf: setattr(pdf.Root, "Collection", Dictionary(View=Name.D))))
    assert '"paper1.pdf" is a portfolio' in answer.text


# Counts and sizes


def test_document_without_pages() -> None:
    """A PDF without pages is refused."""
    assert '"paper1.pdf" has no pages' in refusal(saved(blank(0))).text


def test_page_limit() -> None:
    """Too many pages are refused with both numbers, in one document or in all together."""
    assert joined(paper(3), max_pages=3).pages == 3
    answer = refusal(paper(4), max_pages=3)
    assert (answer.code, answer.status) == (554, "5.6.0")
    assert '"paper1.pdf" has 4 pages; at most 3' in answer.text
    assert "together have 4 pages; at most 3" in refusal(paper(2), paper(2), max_pages=3).text


def test_size_limit() -> None:
    """A document too large for the carrier is refused with both sizes."""
    data = paper()
    assert joined(data, max_size=len(data)).data == data
    answer = refusal(data, max_size=len(data) - 1)
    assert (answer.code, answer.status) == (552, "5.3.4")
    assert "MB" in answer.text


@pytest.mark.parametrize("data", [paper(1).replace(b"/Count 1", b"/Count 9"), papers.million_pages()])
def test_count_that_lies_upwards_is_refused(data: bytes) -> None:
    """A PDF that claims more pages than it has is refused: nobody can tell whether some are lost."""
    answer = refusal(data)
    assert answer.status == "5.6.0"
    assert '"paper1.pdf" is damaged' in answer.text


def test_count_that_lies_downwards_is_put_right() -> None:
    """All pages are sent, and said to be there, when a PDF claims fewer than it has."""
    found = joined(paper(3).replace(b"/Count 3", b"/Count 1"))
    assert page_texts(found.data) == ["page 1", "page 2", "page 3"]


def test_page_used_twice_is_sent_twice() -> None:
    """A page that the page tree lists twice is two pages."""
    data = paper(2).replace(b"/Kids [ 3 0 R 4 0 R ]", b"/Kids [ 3 0 R 3 0 R ]")
    assert page_texts(joined(data).data) == ["page 1", "page 1"]


# Damage


def test_lost_table_is_rebuilt() -> None:
    """A PDF that lost only its table of objects is repaired and sent with all its pages."""
    data = paper(3)
    found = joined(data[: data.rindex(b"xref\n0") + 5])
    assert page_texts(found.data) == ["page 1", "page 2", "page 3"]
    assert joined(data.replace(b"startxref\n", b"startxref\n9")).data != data


def test_every_cut_is_refused_or_harmless() -> None:
    """Wherever a PDF is cut short, it is refused or all its pages are sent with all that is on them."""
    data = paper(3)
    outcomes = set()
    for length in range(0, len(data), 7):
        try:
            texts = page_texts(joined(data[:length]).data)
        except MailRefused as answer:
            assert "is damaged" in answer.text  # noqa: PT017  # either outcome is right
            outcomes.add("refused")
        else:
            assert texts == ["page 1", "page 2", "page 3"]
            outcomes.add("repaired")
    assert outcomes == {"refused", "repaired"}


def test_every_lost_octet_is_refused_or_harmless() -> None:
    """Whichever octet of a PDF is lost, it is refused or all its pages are sent with all that is on them."""
    data = paper(2)
    # Without its filter's name a stream is still a stream, and no reader could tell.
    undetectable = {place for word in re.finditer(rb"Filter", data) for place in range(*word.span())}
    outcomes = set()
    for place in sorted(set(range(0, len(data), 2)) - undetectable):
        try:
            texts = page_texts(joined(data[:place] + data[place + 1 :]).data)
        except MailRefused as answer:
            assert answer.code == 554  # noqa: PT017  # either outcome is right
            outcomes.add("refused")
        else:
            assert texts == ["page 1", "page 2"]
            outcomes.add("repaired")
    assert outcomes == {"refused", "repaired"}


def test_line_ends_converted_on_the_way_are_refused() -> None:
    """A PDF sent as text, its line ends converted, is refused: its pages may look sound and be wrong."""
    data = saved(blank(1, text="x" * 500), compress_streams=True)
    assert b"\n" in data[data.index(b"stream\n") + 7 : data.index(b"endstream") - 1]
    assert "is damaged" in refusal(data.replace(b"\n", b"\r\n")).text


def test_rebuilt_file_with_a_blank_page_is_refused() -> None:
    """A page without content in a file that lost its table is not believed to be blank."""
    data = changed(lambda pdf: pdf.add_blank_page())
    assert joined(data).data == data
    assert "is damaged" in refusal(data.replace(b"/Contents", b"/Content")).text


def test_written_document_is_checked_again() -> None:
    """A document on whose pages the two parsers disagree never leaves, even if it was written here."""
    document._confirm(paper(2), 2)
    with pytest.raises(pikepdf.PdfError):
        document._confirm(paper(2).replace(b"/Count 2", b"/Count 9"), 2)


def test_unreadable_page_is_refused() -> None:
    """A page whose content cannot be decoded is not faxed blank."""
    data = paper(2)
    start = data.index(b"stream\n") + 12
    assert '"paper1.pdf" is damaged' in refusal(data[:start] + b"XXXXX" + data[start + 5 :]).text


@pytest.mark.parametrize(
    "objects",
    [
        [b"<< /Type /Catalog >>"],
        [b"5"],
        [b"<< /Type /Catalog /Pages 2 0 R >>", b"[ 1 2 ]"],
        [b"<< /Type /Catalog /Pages 2 0 R >>", b"<< /Type /Pages /Count 1 /Kids [ 2 0 R ] >>"],
        [b"<< /Type /Catalog /Pages 2 0 R >>", b"<< /Type /Pages /Count 1 /Kids 7 >>"],
    ],
)
def test_nonsense_is_refused(objects: list[bytes]) -> None:
    """A PDF without a page tree worth the name is refused, whatever stands in its place."""
    assert refusal(written(*objects)).status == "5.6.0"
    assert "is damaged" in refusal(b"%PDF-1.7\n").text


def test_sloppy_program_is_served() -> None:
    """Slips that every reader forgives (no MediaBox, no Resources, odd Count) do not refuse a document."""
    found = joined(
        written(
            b"<< /Type /Catalog /Pages 2 0 R >>",
            b"<< /Type /Pages /Count (1) /Kids [ 3 0 R ] >>",
            b"<< /Type /Page /Parent 2 0 R /Contents [ 4 0 R 5 0 R ] >>",
            stream(b"0 0 9 9 re"),
            stream(b"f"),
        )
    )
    assert found.pages == 1


# Several documents


def test_documents_are_joined_in_order() -> None:
    """Several PDFs become one, in order, each page with its own size."""
    found = joined(paper(2, text="a"), paper(1, text="b", size=(595, 842)), paper(1, text="c"))
    assert page_texts(found.data) == ["a 1", "a 2", "b 1", "c 1"]
    with pikepdf.open(io.BytesIO(found.data)) as pdf:
        assert [int(page.mediabox[3]) for page in pdf.pages] == [792, 792, 842, 792]


def test_joining_is_repeatable() -> None:
    """The same mail gives the same document, octet for octet."""
    parts = (paper(2), locked(), paper(1))
    assert joined(*parts[::2]) == joined(*parts[::2])


def test_filled_in_text_survives_joining() -> None:
    """What somebody filled into two forms is on the joined fax, though their fields have the same name."""
    found = joined(papers.filled_form("name", "Alice"), papers.filled_form("name", "Bob"))
    with pikepdf.open(io.BytesIO(found.data)) as pdf:
        assert [str(field.V) for field in pdf.Root.AcroForm.Fields] == ["Alice", "Bob"]
        assert pdf.Root.AcroForm.NeedAppearances


def test_one_bad_document_refuses_all() -> None:
    """One damaged PDF among good ones refuses the mail and is named."""
    assert '"paper2.pdf" is damaged' in refusal(paper(), b"%PDF-1.7", paper()).text


def test_documents_that_cannot_be_joined() -> None:
    """PDFs that are fine alone and cannot be joined are refused as a whole."""
    odd = written(
        b"<< /Type /Catalog /Pages 2 0 R /Names << /Dests 7 >> >>",
        b"<< /Type /Pages /Count 1 /Kids [ 3 0 R ] >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [ 0 0 612 792 ] /Resources << >> /Annots [ 4 0 R ] >>",
        b"<< /Type /Annot /Subtype /Link /Rect [ 0 0 9 9 ] /A << /S /GoTo /D (there) >> >>",
    )
    assert joined(odd).data == odd
    answer = refusal(odd, odd)
    assert (answer.code, answer.status) == (554, "5.6.0")
    assert "cannot be joined" in answer.text


# The picture


def picture(data: bytes) -> Image.Image:
    """Return the picture of a document's first page, having seen that it is within its bounds."""
    image = Image.open(io.BytesIO(first_page_picture(data)))
    assert image.format == "PNG"
    assert image.mode == "L"
    assert 1 <= image.width <= 500
    assert 1 <= image.height <= 1500
    return image


def test_picture_shows_the_page() -> None:
    """The picture is about 500 pixels wide, upright, and shows what is on the page."""
    image = picture(paper(2))
    assert image.size == (499, 646)
    ink = image.point(lambda grey: 255 if grey < 128 else 0).getbbox()
    assert ink
    assert ink[1] > image.height * 0.8  # the words stand near the lower edge


def test_picture_shows_what_was_filled_in() -> None:
    """Text filled into a form is in the picture."""
    assert (
        picture(papers.filled_form("a", "Alice")).tobytes() != picture(papers.filled_form("a", "")).tobytes()
    )


@pytest.mark.parametrize(
    "box",
    ["0 0 4 4", "0 0 14400 14400", "0 0 3 14400", "0 0 14400 3", "0 0 0 0", "0 0 99999999 5", "9 9 -5 -5"],
)
def test_picture_is_bounded(box: str) -> None:
    """No page size makes the picture larger than its bounds, or the process larger than its memory."""
    data = paper().replace(b"[ 0 0 612 792 ]", f"[ {box} ]".encode())
    with pikepdf.open(io.BytesIO(data)) as pdf:
        data = saved(pdf)
    picture(data)


def test_picture_of_a_rotated_page() -> None:
    """A page that lies on its side is drawn as a reader sees it."""
    assert picture(changed(lambda pdf: pdf.pages[0].rotate(90, relative=True))).height < 400


@pytest.mark.parametrize("data", [b"", b"%PDF-1.7", saved(blank(0)), locked(user="secret")])
def test_picture_that_cannot_be_drawn(data: bytes) -> None:
    """What cannot be drawn is an error of its own kind."""
    with pytest.raises(NotDrawn):
        first_page_picture(data)
