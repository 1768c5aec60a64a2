import hashlib
from email.message import EmailMessage
from email.policy import SMTP

import papers
import pytest
from papers import mail, mail_of, multipart, paper, part, refusal, text

from gateway.message import Mail, MailRefused, parse

PDF = paper()


def refused_part(*parts: bytes) -> MailRefused:
    """Return the refusal of a mail that holds a good PDF and these parts."""
    return refusal(mail(multipart(text(), part(PDF), *parts)))


def taken(*parts: bytes) -> Mail:
    """Return the mail that holds a good PDF and these parts, having seen that only the PDF is faxed."""
    found = parse(mail(multipart(text(), part(PDF), *parts)))
    assert [attachment.data for attachment in found.attachments] == [PDF]
    return found


# What is faxed


def test_several_pdfs_keep_their_order() -> None:
    """Several PDFs in a mail are faxed in the order in which they were attached."""
    first, second = paper(text="first"), paper(text="second")
    found = parse(mail_of(second, first))
    assert [(a.name, a.data) for a in found.attachments] == [("paper1.pdf", second), ("paper2.pdf", first)]


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("application/octet-stream", "scan.PDF"),
        ("application/octet-stream", "scan"),
        ("application/x-pdf", None),
        ("image/tiff", "wrong-label.tif"),
        ("text/plain", "text.txt"),
    ],
)
def test_content_decides_what_is_a_pdf(kind: str, name: str | None) -> None:
    """A PDF is recognised by its content, whatever label the sender's program put on it."""
    found = parse(mail(multipart(text(), part(PDF, kind, name))))
    assert [a.data for a in found.attachments] == [PDF]
    assert found.attachments[0].name == (name or "document.pdf")


@pytest.mark.parametrize("kind", ["application/pdf", "application/octet-stream"])
def test_whole_body_may_be_the_pdf(kind: str) -> None:
    """A scanner that sends the PDF as the body of its mail is served."""
    found = parse(mail(part(PDF, kind, None, disposition=None)))
    assert [a.data for a in found.attachments] == [PDF]


@pytest.mark.parametrize("encoding", ["binary", "8bit"])
def test_unencoded_pdf_arrives_unchanged(encoding: str) -> None:
    """A PDF sent as raw octets, with every kind of line end in it, is not altered by a single octet."""
    raw = PDF + bytes(range(256)) + b"\r\n\n\r end"
    found = parse(mail(multipart(text(), part(raw, encoding=encoding))))
    assert found.attachments[0].data == raw


def test_junk_before_the_header_needs_a_label() -> None:
    """Octets before %PDF are tolerated in what calls itself a PDF, and only there."""
    junk = b"@PJL JOB\r\n" + PDF
    assert parse(mail_of(junk)).attachments[0].data == junk
    assert "cannot be faxed" in refusal(mail(part(junk, "application/octet-stream", "job.prn"))).text
    assert "not a PDF" in refusal(mail_of(b" " * 1024 + PDF)).text


def test_mail_with_line_feeds_only() -> None:
    """A mail whose lines end in a bare line feed reads like any other."""
    found = parse(mail_of(PDF).replace(b"\r\n", b"\n"))
    assert (found.subject, found.attachments[0].data) == ("Order 4711", PDF)


# What is passed over


def test_body_text_and_its_html_are_passed_over() -> None:
    """The words of a mail, in plain text and HTML, are not attachments."""
    body = multipart(
        text(), text("<p>Hi</p>", "text/html"), kind="multipart/alternative", boundary="=_alternative"
    )
    assert len(parse(mail(multipart(body, part(PDF)))).attachments) == 1


def test_logo_that_the_html_shows_is_passed_over() -> None:
    """A logo shown by the HTML is no attachment, also when its name is written in escapes."""
    html = text('<img src="cid:logo%40x"><img src=cid:a&amp;b>', "text/html")
    logo = part(b"\x89PNG", "image/png", "logo.png", disposition="inline", fields=("Content-ID: <logo@x>",))
    other = part(b"GIF8", "image/gif", None, disposition=None, fields=("Content-ID: <a&b>",))
    taken(html, logo, other)


def test_picture_that_nobody_shows_refuses_the_mail() -> None:
    """A photograph beside the PDF is refused by name, because it would be missing on the fax."""
    photo = part(b"\xff\xd8", "image/jpeg", "photo.jpg", disposition="inline", fields=("Content-ID: <p@x>",))
    assert '"photo.jpg"' in refused_part(text("<p>no picture</p>", "text/html"), photo).text


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("application/pkcs7-signature", "smime.p7s"),
        ("application/octet-stream", "smime.P7S"),
        ("application/pgp-signature", "signature.asc"),
        ("application/pgp-keys", "key.asc"),
        ("text/vcard", "me.vcf"),
        ("application/octet-stream", "me.vcf"),
        ("text/plain", "ATT00001.txt"),
        ("text/html", "ATT00002.htm"),
    ],
)
def test_signatures_vcards_and_exchange_text_are_passed_over(kind: str, name: str) -> None:
    """Signatures, vCards and the text files that Exchange makes of a mail's words do not refuse it."""
    taken(part(b"not a document", kind, name))


def test_broken_encoding_in_what_is_passed_over_does_no_harm() -> None:
    """Broken base64 in a signature does not refuse the mail: nobody would miss it on the fax."""
    taken(part(b"!", "application/pgp-signature", "signature.asc", fields=()).replace(b"IQ==", b"I!Q="))


def test_signed_mail_is_read() -> None:
    """A clear-signed mail (multipart/signed) gives up its PDF."""
    inner = multipart(text(), part(PDF), boundary="=_inner")
    signature = part(b"sig", "application/pkcs7-signature", "smime.p7s")
    found = parse(mail(multipart(inner, signature, kind="multipart/signed; micalg=sha256")))
    assert [a.data for a in found.attachments] == [PDF]


# What refuses the mail


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("application/vnd.openxmlformats-officedocument.wordprocessingml.document", "letter.docx"),
        ("application/zip", "all.zip"),
        ("text/calendar", "invite.ics"),
        ("text/plain", "notes.txt"),
    ],
)
def test_other_attachments_refuse_the_mail_by_name(kind: str, name: str) -> None:
    """One attachment that cannot be faxed refuses the whole mail, so that no part goes missing in silence."""
    answer = refused_part(part(b"content", kind, name))
    assert (answer.code, answer.status) == (554, "5.6.1")
    assert f'"{name}"' in answer.text
    assert name not in answer.log


def test_attachment_without_a_name_and_with_an_odd_type() -> None:
    """An attachment that has no name is refused too, and its odd type stays out of the log."""
    answer = refused_part(part(b"content", "x/" + "y" * 100, None))
    assert "An attachment without a name" in answer.text
    assert "yyy" not in answer.log


def test_mail_without_any_pdf() -> None:
    """A mail of nothing but words is refused with the hint to attach a PDF."""
    for raw in (mail(text()), b"", b"\r\n", b"\r\nno header"):
        answer = refusal(raw)
        assert (answer.code, answer.status) == (554, "5.6.1")
        assert "attach the document as a PDF" in answer.text


@pytest.mark.parametrize("kind", ["application/pdf", "application/octet-stream"])
def test_false_label_is_refused(kind: str) -> None:
    """A file that is called a PDF and is none is refused by name."""
    answer = refusal(mail(multipart(text(), part(b"PK\x03\x04", kind, "fake.pdf"))))
    assert (answer.code, answer.status) == (554, "5.6.0")
    assert '"fake.pdf" is not a PDF' in answer.text


def test_empty_attachment_is_refused() -> None:
    """An empty attachment is refused by name: the sender meant to send something."""
    answer = refused_part(part(b"", name="empty.pdf"))
    assert '"empty.pdf" is empty' in answer.text
    assert "is empty" in refused_part(part(b"", "application/zip", "x.zip")).text


@pytest.mark.parametrize("change", ["cut", "foreign", "double"])
def test_broken_base64_is_refused(change: str) -> None:
    """A PDF whose encoding was damaged on the way is refused instead of being guessed at."""
    whole = part(PDF + b"x", name="scan.pdf")
    broken = {
        "cut": whole.rstrip()[:-1],
        "foreign": whole.replace(b"\r\n\r\n", b"\r\n\r\n*"),
        "double": whole + b"JVBERi0=",
    }[change]
    answer = refusal(mail(multipart(text(), broken)))
    assert (answer.status, '"scan.pdf" arrived damaged' in answer.text) == ("5.6.0", True)


def test_spaces_in_base64_do_no_harm() -> None:
    """White space that a relay added to base64 lines is not damage."""
    assert taken().attachments[0].data == PDF
    spaced = part(PDF).replace(b"\r\n", b" \t\r\n")
    head, _, body = spaced.partition(b" \t\r\n \t\r\n")
    raw = mail(multipart(text(), head.replace(b" \t\r\n", b"\r\n") + b"\r\n\r\n" + body))
    assert parse(raw).attachments[0].data == PDF


@pytest.mark.parametrize(
    "kind", ["message/rfc822", "message/external-body; access-type=URL", "message/partial"]
)
def test_forwarded_mail_is_refused(kind: str) -> None:
    """A mail inside the mail is refused with the advice to attach the PDF itself; no link is followed."""
    inner = b'Content-Type: %b; name="Re: report"\r\n\r\n%b' % (kind.encode(), mail_of(PDF))
    answer = refused_part(inner)
    assert answer.status == "5.6.1"
    assert "attach the PDF itself" in answer.text
    assert '"Re: report"' in answer.text


@pytest.mark.parametrize(
    ("kind", "name"), [("application/ms-tnef", "x.dat"), ("application/octet-stream", "WINMAIL.DAT")]
)
def test_winmail_dat_is_refused_with_the_way_out(kind: str, name: str) -> None:
    """Outlook's own wrapping is refused and the sender told how to switch it off."""
    assert "send it as HTML or plain text" in refused_part(part(b"\x78\x9f\x3e\x22", kind, name)).text


@pytest.mark.parametrize(
    ("kind", "name", "content"),
    [
        ("application/pkcs7-mime; smime-type=enveloped-data", "smime.p7m", b"\x30"),
        ("application/octet-stream", "smime.p7m", b"\x30"),
        ("application/octet-stream", "report.pdf.gpg", b"\x85"),
        ("application/octet-stream", "report.pdf.asc", b"-----BEGIN PGP MESSAGE-----\n"),
    ],
)
def test_encrypted_attachment_is_refused(kind: str, name: str, content: bytes) -> None:
    """An encrypted attachment is refused by name, not passed over as a signature."""
    answer = refused_part(part(content, kind, name))
    assert answer.status == "5.6.1"
    assert f'"{name}" is encrypted' in answer.text


def test_encrypted_mail_is_refused() -> None:
    """A mail encrypted as a whole (PGP/MIME) is refused as such."""
    version = part(b"Version: 1", "application/pgp-encrypted", None, disposition=None, encoding="7bit")
    raw = mail(multipart(version, part(b"-----BEGIN"), kind="multipart/encrypted"))
    assert "The mail is encrypted" in refusal(raw).text


@pytest.mark.parametrize(
    "field",
    [
        "Auto-Submitted: auto-replied (vacation)",
        "auto-submitted: AUTO-REPLIED; owner-email=x@example.com",
        "List-Id: <list.example.com>",
        "List-Unsubscribe: <mailto:leave@example.com>",
        "Precedence: bulk",
        "Precedence: Junk",
    ],
)
def test_mail_that_nobody_wrote_is_refused(field: str) -> None:
    """Automatic replies and list mail are refused: there is nobody to tell the outcome."""
    answer = refusal(mail(multipart(part(PDF)), field))
    assert (answer.code, answer.status) == (550, "5.7.1")
    assert "nobody could be told" in answer.text


def test_delivery_report_is_refused() -> None:
    """A bounce is never faxed, or two gateways could keep each other busy."""
    raw = mail(multipart(part(PDF), kind="multipart/report; report-type=delivery-status"))
    assert refusal(raw).status == "5.7.1"


@pytest.mark.parametrize(
    "field", ["Auto-Submitted: auto-generated", "Auto-Submitted: no", "Precedence: normal"]
)
def test_device_that_marks_its_mail_is_served(field: str) -> None:
    """A scanner that says its mail is automatic is served like a person."""
    assert len(parse(mail(multipart(part(PDF)), field)).attachments) == 1


def test_looping_mail_is_refused() -> None:
    """A mail that has passed more than 50 systems is refused as a loop."""
    hop = "Received: from a by b; Fri, 20 Nov 2026 09:00:00 +0000"
    assert parse(mail(multipart(part(PDF)), *[hop] * 49)).attachments
    answer = refusal(mail(multipart(part(PDF)), *[hop] * 50))
    assert (answer.code, answer.status) == (554, "5.4.6")


# What is remembered for the reply


def test_header_fields_for_the_reply() -> None:
    """Subject, Message-ID and References come back decoded and on one line."""
    raw = mail(multipart(part(PDF)), "References: <a@x>\r\n <b@x> junk", "In-Reply-To: <c@x>")
    raw = raw.replace(b"Order 4711", b"=?utf-8?q?Bestellung_f=C3=BCr?=\r\n Haus 7")
    found = parse(raw)
    assert found.subject == "Bestellung f\u00fcr Haus 7"
    assert (found.message_id, found.references) == ("<order-4711@example.com>", "<a@x> <b@x>")
    assert found.original_headers.startswith(b"Received: from scanner")
    assert found.original_headers.endswith(b'boundary="=_limit"\r\n')


def test_thread_starts_at_in_reply_to() -> None:
    """Without References the thread continues from In-Reply-To (RFC 5322, 3.6.4)."""
    assert parse(mail(multipart(part(PDF)), "In-Reply-To: <c@x>")).references == "<c@x>"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b"", None),
        (b"<>", "<>"),
        (b"no brackets\x00 here", "no brackets here"),
        (b"(comment) <real@x>", "<real@x>"),
        (b"<" + b"a" * 400 + b">", "<" + "a" * 246 + "..."),
        ("<\u00fc@x>".encode(), "<u@x>"),
    ],
)
def test_odd_message_ids(value: bytes, expected: str | None) -> None:
    """A Message-ID that breaks the rules becomes one harmless line."""
    assert parse(mail_of(PDF).replace(b"<order-4711@example.com>", value)).message_id == expected


def key_of(*message_ids: bytes) -> str | None:
    """Return the key of a mail with these Message-IDs, each a field's octets after the colon."""
    fields = b"".join(b"Message-ID:" + value + b"\r\n" for value in message_ids)
    return parse(fields + mail_of(PDF).replace(b"Message-ID: <order-4711@example.com>\r\n", b"")).message_key


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (b"<" + b"a" * 300 + b"1@x>", b"<" + b"a" * 300 + b"2@x>"),
        (b"a" * 5000 + b"1", b"a" * 5000 + b"2"),
        (b"order  4711", b"order 4711"),
        (b"<a b@x>", b"<ab@x>"),
        ("<\u00fc@x>".encode(), b"<u@x>"),
        (b"\xff", b"\xfe"),
        ("\u200b".encode(), "\u200c".encode()),
        (b"<a@x> 1", b"<a@x> 2"),
        (b"a\x00b", b"a b"),
        (b"<A@x>", b"<a@x>"),
    ],
)
def test_message_ids_that_look_alike_are_told_apart(one: bytes, other: bytes) -> None:
    """Two mails whose Message-IDs differ in any octet, however far back, are not taken for one."""
    assert None not in {key_of(one), key_of(other)}
    assert key_of(one) != key_of(other)
    assert key_of(one) == key_of(one)


def test_the_folding_of_a_message_id_does_not_matter() -> None:
    """A relay that breaks the line elsewhere (RFC 5322, 2.2.3) does not make it another mail."""
    known = hashlib.sha256(b"<a@x> (sent\tagain)").hexdigest()
    for value in (
        b"<a@x> (sent\tagain)",
        b" <a@x> (sent\tagain) \t",
        b"\r\n <a@x>\r\n (sent\r\n\tagain)",
        b" <a@x>\n (sent\tagain)",
    ):
        assert key_of(value) == known


def test_without_a_message_id_there_is_no_key() -> None:
    """A mail without Message-ID, or with nothing but empty ones, has none to be recognised by."""
    assert [key_of(), key_of(b""), key_of(b" \t"), key_of(b" \r\n "), key_of(b"", b"")] == [None] * 5


def test_all_of_several_message_ids_count() -> None:
    """A mail with several Message-IDs is the same as one with the same in the same order, and no other."""
    keys = [key_of(b"<a@x>"), key_of(b"<a@x>", b"<b@x>"), key_of(b"<b@x>", b"<a@x>"), key_of(b"<a@x><b@x>")]
    keys += [key_of(b"<a@x>", b"<a@x>"), key_of(b"<a@x> <b@x>")]
    assert len(set(keys)) == len(keys)
    assert key_of(b"<a@x>", b"", b"<b@x>") == keys[1]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b"=?utf-8?q?a=0D=0ABcc:_x@example.com?=", "a Bcc: x@example.com"),
        (b"=?no-such-charset?q?a?=", "=?no-such-charset?q?a?="),
        (b"=?utf-8?b?a?=", "=?utf-8?b?a?="),
        ("R\u00e9sum\u00e9".encode(), "R\u00e9sum\u00e9"),
        (b"\xff\xfe", "\ufffd\ufffd"),
        (b"=?utf-8?q?=E2=80=AEgnp.exe?=", "gnp.exe"),
        (b"x" * 5000, "x" * 247 + "..."),
    ],
)
def test_odd_subjects(value: bytes, expected: str) -> None:
    """A subject never brings a line end, a hidden character or an endless line into the reply."""
    assert parse(mail_of(PDF).replace(b"Order 4711", value)).subject == expected


def test_mail_without_fields() -> None:
    """A mail without subject and Message-ID is faxed all the same."""
    found = parse(part(PDF))
    assert (found.message_id, found.subject, found.references) == (None, "", "")


def test_original_headers_are_cut_at_a_line() -> None:
    """Of a long header 16 KB are kept, and no line of it is cut in two."""
    fields = [f"X-Note-{n}: {'y' * 70}" for n in range(500)]
    kept = parse(mail(multipart(part(PDF)), *fields)).original_headers
    assert 16 * 1024 - 100 < len(kept) <= 16 * 1024
    assert kept.endswith(b"y\r\n")


def test_digest_tells_lists_of_attachments_apart() -> None:
    """The digest is the same for the same attachments, and for no others, however they are cut up."""
    first, second = PDF, PDF + b"%tail"
    digest = parse(mail_of(first, second)).digest
    assert digest == parse(mail_of(first, second).replace(b"Order", b"order")).digest
    assert digest != parse(mail_of(second, first)).digest
    assert digest != parse(mail_of(first + second)).digest
    alone = hashlib.sha256(hashlib.sha256(PDF).hexdigest().encode()).hexdigest()
    assert parse(mail_of(PDF)).digest == alone


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ('attachment; filename="=?utf-8?q?Pr=C3=BCfung.pdf?="', "Pr\u00fcfung.pdf"),
        ("attachment; filename*=utf-8''Pr%C3%BCfung.pdf", "Pr\u00fcfung.pdf"),
        ("attachment; filename*0=Pr; filename*1=uef.pdf", "Pruef.pdf"),
        ("attachment; filename*=no-such''x.pdf", "x.pdf"),
        ('attachment; filename="a\\"b.pdf"', 'a"b.pdf'),
        ("attachment; filename*=utf-8''a%0D%0Ab%00c%E2%80%AE.pdf", "a b c.pdf"),
        ('attachment; filename="../../etc/passwd.pdf"', "../../etc/passwd.pdf"),
        (f'attachment; filename="{"n" * 2000}.pdf"', "n" * 247 + "..."),
    ],
)
def test_names_are_for_people_only(field: str, expected: str) -> None:
    """A file's name is shown on one line, cut and cleaned; nothing else is ever done with it."""
    content = b"Content-Type: application/pdf\r\nContent-Disposition: %b\r\n\r\n%b" % (field.encode(), PDF)
    assert parse(mail(multipart(content))).attachments[0].name == expected


def test_name_in_a_refusal_is_plain() -> None:
    """A name in a refusal is cut and written in ASCII, since an SMTP reply holds nothing else."""
    answer = refused_part(part(b"x", "application/zip", "R\u00e9sum\u00e9 \u4e2d" + "z" * 300 + ".zip"))
    assert '"R' in answer.text
    assert len(answer.text) < 200


def test_mail_of_the_standard_library() -> None:
    """A mail composed by Python's own library reads as it was meant."""
    composed = EmailMessage(policy=SMTP)
    composed["Subject"] = "Gr\u00fc\u00dfe"
    composed.set_content("See attachment \u00fc.")
    composed.add_alternative("<p>See</p>", subtype="html")
    composed.add_attachment(PDF, "application", "pdf", filename="Pr\u00fcfung \u4e2d.pdf")
    found = parse(composed.as_bytes())
    assert (found.subject, found.attachments[0].name) == ("Gr\u00fc\u00dfe", "Pr\u00fcfung \u4e2d.pdf")
    assert papers.page_texts(found.attachments[0].data) == ["page 1"]
