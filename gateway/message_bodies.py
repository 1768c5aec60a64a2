"""Keep the large bodies of a mail away from the MIME parser, which goes through it line by line.

In charge of finding the base64 that nearly all of a large mail consists of, of the line that stands for it
while the standard parser reads the rest, and of a part's content, for which it is put back.

Promises: a mail is read exactly as the standard parser alone would read it. Only lines of nothing but the
letters of base64 (RFC 2045 section 6.8) are lifted out, and the parser takes those as text wherever it meets
them: a boundary begins with two hyphens (RFC 2046 section 5.1.1), a header field has a colon and its further
lines a blank in front (RFC 5322 section 2.2), and the line that ends a header block is empty. The line in
their place is none of these either. Whatever looks otherwise than expected stays in the mail for the parser
to judge, and the search takes time in proportion to the mail, whatever it holds.

Raises what the standard library raises for a payload that it cannot decode.
"""

import binascii
import re
import string
from collections.abc import Iterator
from email.message import Message
from email.policy import Policy

import pybase64

LARGE = 2 * 1024
"""Octets from which on it pays to lift a body out."""

_LETTERS = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
_BLANK_LINE = b"\r\n\r\n"
_MARK = "*lifted from octet "  # neither the asterisk nor the blank is among the letters
_MARKED = re.compile(re.escape(_MARK) + r"(\d+)\*")
_AT_ONCE = 256 * 1024


class Bodies:
    """The large bodies of one mail; `rest` is the mail with a line in the place of each.

    `large`: the octets from which on a body is lifted out.
    """

    def __init__(self, raw: bytes, large: int = LARGE) -> None:
        self._raw = raw
        self._ends = dict(_found(raw, large))
        pieces: list[bytes] = []
        reached = 0
        for start, end in self._ends.items():
            pieces += raw[reached:start], f"{_MARK}{start}*".encode()
            reached = end
        self.rest = b"".join((*pieces, raw[reached:]))
        if self._ends and self.rest.count(_MARK.encode()) != len(self._ends):  # the mail holds such a line
            self._ends = {}
            self.rest = raw

    def whole(self, text: str) -> str:
        """Return a payload that the parser read in `rest` as it would have read it in the mail."""
        if not self._ends or _MARK not in text:
            return text
        return _MARKED.sub(lambda mark: self._lifted(int(mark[1])).decode("ascii"), text)

    def decoded(self, text: str) -> bytes | None:
        """Return what a payload in base64 stands for, None if it is not simply one lifted body and its end.

        Raises binascii.Error for what the strict decoder refuses.
        """
        before, _, marked = text.partition(_MARK)
        place, _, after = marked.partition("*")
        if not self._ends or not place or before.strip(string.whitespace) or not after.isascii():
            return None
        # Whole groups of four letters were lifted: in front of the end, one such says as much as all of them.
        binascii.a2b_base64(b"AAAA" + b"".join(after.encode("ascii").split()), strict_mode=True)
        start = int(place)
        body = memoryview(self._raw)[start : self._ends[start] + len(after)]
        return pybase64.b64decode(body)  # passes over line ends, and over nothing else by now

    def _lifted(self, start: int) -> bytes:
        return self._raw[start : self._ends[start]]


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


def _found(raw: bytes, large: int) -> Iterator[tuple[int, int]]:
    """Yield where in a mail a large body begins, and where its last line but the line end ends."""
    reached = 0
    while (blank := raw.find(_BLANK_LINE, reached)) >= 0:
        # A body begins behind a blank line and holds none: of several within its least length, the last.
        blank = raw.rfind(_BLANK_LINE, blank, blank + len(_BLANK_LINE) + large)
        start = blank + len(_BLANK_LINE)
        hyphen = raw.find(b"-", start)
        reached = hyphen if hyphen >= 0 else len(raw)
        end = _end(raw, start, reached)
        if end - start >= large:
            yield start, end


def _end(raw: bytes, start: int, limit: int) -> int:
    """Return where the lines of base64 that begin at `start` end, `start` itself if there are none to lift.

    They are of one length, as every encoder writes them. Lifted are multiples of four lines, so of four
    letters; the last lines stay, and with them the padding and what else may stand in front of a boundary.
    """
    width = raw.find(b"\r\n", start, limit) - start
    if width < 1:
        return start
    step = width + 2
    lines = ((limit - start) // step - 1) // 4 * 4
    if lines < 1:
        return start
    end = start + lines * step
    returns, feeds = raw[start + width : end : step], raw[start + width + 1 : end : step]
    if returns != b"\r" * lines or feeds != b"\n" * lines:
        return start
    # These line ends must be all that is not a letter.
    other = sum(
        len(raw[place : min(place + _AT_ONCE, end)].translate(None, _LETTERS))
        for place in range(start, end, _AT_ONCE)
    )
    return end - 2 if other == 2 * lines else start
