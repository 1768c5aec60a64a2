"""Keep the large bodies of a mail away from the MIME parser, which goes through it line by line.

In charge of finding the base64 that nearly all of a large mail consists of, of the line that stands for it
while the standard parser reads the rest, and of a part's content, for which it is put back.

Promises: a mail is read exactly as the standard parser alone would read it. Only lines of nothing but the
letters of base64 (RFC 2045 section 6.8) are lifted out, and the parser takes those as text wherever it meets
them: a boundary begins with two hyphens (RFC 2046 section 5.1.1), a header field has a colon and its further
lines a blank in front (RFC 5322 section 2.2), and the line that ends a header block is empty. The line in
their place is none of these either. Whatever looks otherwise than expected stays in the mail for the parser
to judge, and the search takes time in proportion to the mail, whatever it holds.

Fails: with what the standard library raises for a payload that it cannot decode.
"""

import binascii
import re
import string
from collections.abc import Iterator
from dataclasses import dataclass
from email.message import Message
from email.policy import Policy

import pybase64

LARGE = 2 * 1024
"""Octets from which on it pays to lift a body out."""

_BLANK_LINE = b"\r\n\r\n"
_MARK = "*lifted from octet "  # neither the asterisk nor the blank is among the letters
_MARKED = re.compile(re.escape(_MARK) + r"(\d+)\*")


@dataclass(frozen=True, slots=True)
class _Lifted:
    end: int  # where the last lifted line ends, without its line end
    octets: bytes  # what they and the lines up to the next hyphen stand for


class Bodies:
    """The large bodies of one mail; `rest` is the mail with a line in the place of each.

    `large`: the octets from which on a body is lifted out.
    """

    def __init__(self, raw: bytes, large: int = LARGE) -> None:
        self._raw = raw
        self._lifted = dict(_found(raw, large))
        pieces: list[bytes] = []
        reached = 0
        for start, lifted in self._lifted.items():
            pieces += raw[reached:start], f"{_MARK}{start}*".encode()
            reached = lifted.end
        self.rest = b"".join((*pieces, raw[reached:]))
        if self.rest.count(_MARK.encode()) != len(self._lifted):  # the mail holds such a line
            self._lifted = {}
            self.rest = raw

    def whole(self, text: str) -> str:
        """Return a payload that the parser read in `rest` as it would have read it in the mail."""
        if not self._lifted or _MARK not in text:
            return text
        return _MARKED.sub(lambda mark: self._text(int(mark[1])), text)

    def decoded(self, text: str) -> bytes | None:
        """Return what a payload in base64 stands for, None if it is not simply one lifted body and its end.

        Raises binascii.Error for what the strict decoder refuses.
        """
        before, _, marked = text.partition(_MARK)
        place, _, after = marked.partition("*")
        if not self._lifted or not place or before.strip(string.whitespace) or not after.isascii():
            return None
        # The strict decoder looks at what follows the mark; one group of four letters stands for those that
        # were lifted, since nothing is wrong with whole groups, and padding needs one in front.
        binascii.a2b_base64(b"AAAA" + b"".join(after.encode("ascii").split()), strict_mode=True)
        # It found no hyphen there, so no more follows than `_lifted` decoded along with the body.
        return self._lifted[int(place)].octets

    def _text(self, start: int) -> str:
        return self._raw[start : self._lifted[start].end].decode("ascii")


class Part(Message):
    """A part of a mail whose large bodies may have been lifted out."""

    # As the parser left it: `get_payload` would read octets beyond ASCII in the part's charset.
    _payload: str | list[Message] | None

    def __init__(self, policy: "Policy[Message]", bodies: Bodies) -> None:
        super().__init__(policy=policy)
        self._bodies = bodies

    def content(self) -> bytes | None:
        """Return the decoded octets of a part without parts, or None if its base64 is broken or cut.

        The standard decoder guesses what broken base64 meant; a fax must not be a guess. White space is not
        part of the encoding (RFC 2045 section 6.8).
        """
        in_base64 = str(self.get("content-transfer-encoding", "")).strip().lower() == "base64"
        text = self._payload
        try:
            if in_base64 and isinstance(text, str) and (decoded := self._bodies.decoded(text)) is not None:
                return decoded
            if isinstance(text, str):
                self.set_payload(self._bodies.whole(text))
            if in_base64:
                payload = str(self.get_payload()).encode("ascii", "surrogateescape")
                return binascii.a2b_base64(b"".join(payload.split()), strict_mode=True)
        except binascii.Error:
            return None
        plain = self.get_payload(decode=True)
        return plain if isinstance(plain, bytes) else b""


def _found(raw: bytes, large: int) -> Iterator[tuple[int, _Lifted]]:
    """Yield where in a mail a large body begins, and what is lifted out there."""
    reached = 0
    while (blank := raw.find(_BLANK_LINE, reached)) >= 0:
        # A body begins behind a blank line and holds none: of several within its least length, the last.
        blank = raw.rfind(_BLANK_LINE, blank, blank + len(_BLANK_LINE) + large)
        start = blank + len(_BLANK_LINE)
        hyphen = raw.find(b"-", start)
        reached = hyphen if hyphen >= 0 else len(raw)
        lifted = _lifted(raw, start, reached)
        if lifted is not None and lifted.end - start >= large:
            yield start, lifted


def _lifted(raw: bytes, start: int, limit: int) -> _Lifted | None:
    """Return what is lifted out of the lines of base64 that begin at `start`, None if there are none.

    They are of one length, as every encoder writes them. Lifted are multiples of four lines, so of four
    letters; the last lines stay, and with them the padding and what else may stand in front of a boundary.
    """
    width = raw.find(b"\r\n", start, limit) - start
    if width < 1:
        return None
    step = width + 2
    lines = ((limit - start) // step - 1) // 4 * 4
    end = start + lines * step
    returns, feeds = raw[start + width : end : step], raw[start + width + 1 : end : step]
    if lines < 1 or returns != b"\r" * lines or feeds != b"\n" * lines:
        return None
    octets = _octets(memoryview(raw)[start:limit], end - start, lines * width)
    return None if octets is None else _Lifted(end - 2, octets)


def _octets(body: memoryview, end: int, letters: int) -> bytes | None:
    """Return what a body stands for, None if up to `end` there is more than `letters` and line ends.

    The decoder passes over what is no letter, and gives three octets for four letters: with one letter less
    it cannot come to as many. What follows `end` is decoded alone first, to know what it adds.
    """
    try:
        try:
            after = len(binascii.a2b_base64(b"".join(bytes(body[end:]).split()), strict_mode=True))
        except binascii.Error:  # broken behind the lines: whoever wants the whole will hear of it
            body, after = body[:end], 0
        octets = pybase64.b64decode(body)
    except binascii.Error:
        return None
    return octets if len(octets) == letters // 4 * 3 + after else None
