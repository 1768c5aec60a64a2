"""The octets of a mail, from the 354 to the final dot, as they come from the network.

In charge of: finding the end of a mail in pieces of any size, taking away the dots that its sender doubled,
and writing the rest to a file; the limits on the mail's size and on its lines.

Promises: CR LF . CR LF ends a mail and nothing else does (RFC 5321, 4.1.1.4): a lone CR or LF counts for no
part of it, however the octets were cut into pieces. What comes after the end is handed back untouched. The
file holds the mail octet for octet, the doubled dots aside (4.5.2). Memory stays flat: four octets of a mail
wait at most. Of one that is refused nothing more is written, and what was written is given back.

Fails: never by raising. `fault` tells what is wrong with the mail; its end is looked for all the same, since
the client listens for an answer only there (4.2.5).
"""

import contextlib
import errno
import os
from collections.abc import Callable
from enum import Enum, auto
from typing import BinaryIO

_END = b"\r\n.\r\n"
_BEGINNINGS = tuple(_END[:length] for length in range(len(_END) - 1, 0, -1))  # the longest first
_ASK_EVERY = 1_000_000  # octets
_BEFORE_THE_FIRST_LINE = b"\r\n"  # a mail begins like a line: with a dot it may end at once


class Fault(Enum):
    """Why a mail cannot be taken."""

    TOO_LARGE = auto()
    LONG_LINE = auto()


class MailData:
    """One mail while it comes in.

    `fault`: why it cannot be taken; an OSError if it could not be written.
    """

    def __init__(
        self, file: BinaryIO, *, size_limit: int, line_limit: int, room: Callable[[], bool] = lambda: True
    ) -> None:
        """`line_limit` is for a line with its CR LF; both limits count doubled dots, as they are received.

        `room` is asked from time to time whether the mail may go on; if not, that is a disk that is full.
        """
        self._file = file
        self._room = room
        self._asked = 0  # octets at the last time
        self._size_limit = size_limit
        self._line_limit = line_limit
        self._held = _BEFORE_THE_FIRST_LINE
        self._begun = False  # whether that was passed over
        self._line = 0  # octets of the line that the next piece goes on with
        self._size = 0
        self.fault: Fault | OSError | None = None

    def feed(self, piece: bytes) -> bytes | None:
        """Take the next octets; return what follows the end once that has come, else None."""
        window = self._held + piece
        # A single octet is found at the speed of memory, a longer text is not; and base64 holds no dot.
        end = window.find(_END) if b"." in window else -1
        if end >= 0:
            self._take(window[: end + 2])
            self._write_out()
            return window[end + len(_END) :]
        # What may belong to the end, or to a doubled dot, waits for the next piece.
        held = next((len(beginning) for beginning in _BEGINNINGS if window.endswith(beginning)), 0)
        self._held = window[len(window) - held :]
        self._take(window[: len(window) - held])
        return None

    def _take(self, octets: bytes) -> None:
        if not octets or self.fault is not None:
            return
        self.fault = self._written(octets)
        if self.fault is not None:
            # The rest may take long to come: it shall not keep space meanwhile. No flush before, it may fail
            # again; what it would have written goes when the file is discarded.
            with contextlib.suppress(OSError):
                os.ftruncate(self._file.fileno(), 0)

    def _written(self, octets: bytes) -> Fault | OSError | None:
        """Write what has come; return what is wrong with it."""
        first = 0 if self._begun else len(_BEFORE_THE_FIRST_LINE)
        self._begun = True
        self._size += len(octets) - first
        if self._size > self._size_limit:
            return Fault.TOO_LARGE
        if self._has_long_line(octets, first - self._line):
            return Fault.LONG_LINE
        try:
            if self._size - self._asked > _ASK_EVERY:
                self._asked = self._size
                if not self._room():
                    return OSError(errno.ENOSPC, "too little is left for what has begun")
            plain = octets.replace(b"\r\n.", b"\r\n") if b"." in octets else octets
            self._file.write(plain[first:])
        except OSError as error:
            return error
        return None

    def _has_long_line(self, octets: bytes, start: int) -> bool:
        """Look at the lines of which the first began at `start`, below 0 in an earlier piece."""
        while len(octets) - start > self._line_limit:
            end = octets.rfind(b"\r\n", max(0, start), start + self._line_limit)
            if end < 0:
                return True
            start = end + 2
        end = octets.rfind(b"\r\n", max(0, start))
        self._line = len(octets) - (end + 2 if end >= 0 else start)
        return False

    def _write_out(self) -> None:
        if self.fault is None:
            try:
                self._file.flush()
            except OSError as error:
                self.fault = error
