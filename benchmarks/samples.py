"""The mails that are sent: real ones, each with a PDF of the wanted size.

Nothing in the PDF can be compressed but one page of text: its size is what a scanner's page has, and the
check of it reads every object.
"""

from pathlib import Path

from papers import heavy, mail_of

SENDER = "clerk@example.com"
_AROUND = 780  # octets that `heavy` adds around what it was asked for

SIZES = {"2 KB": 2_000, "100 KB": 100_000, "1 MB": 1_000_000, "20 MB": 20_000_000}
"""Octets of the PDF; the mail is larger by 37 %."""


def letter(size: int) -> bytes:
    """Return a mail with a PDF of at most so many octets, and hardly less."""
    return mail_of(heavy(size - _AROUND))


def letter_file(folder: Path, size: int) -> Path:
    """Write such a mail down as `smtp-source -F` wants it: it ends the lines itself; return the file."""
    path = folder / f"letter-{size}"
    if not path.exists():
        path.write_bytes(letter(size).replace(b"\r\n", b"\n"))
    return path


def number(place: int) -> str:
    """Return a telephone number of its own for each place from 0 to 899,999."""
    return f"+1312{2_000_000 + place}"
