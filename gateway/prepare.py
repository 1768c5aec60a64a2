"""From the octets after DATA to the finished document: the daemon's side, which asks a child process.

In charge of the files on that way: `Preparer` gives a private one to receive the mail into and asks a child
(`prepare_child`), which writes the document into a second one; nothing large goes through the pipe. The
libraries that read documents are never loaded here.

Promises: the files exist with mode 0600 in a folder of the gateway's own, the mail until `Received.discard`
and the document until `Prepared.discard`; every way out removes them, and `sweep` removes what a killed
daemon left. One picture is drawn at a time: with two children or more, pages that are slow to draw never keep
a mail waiting.

Fails: `MailRefused` with the answer for the sender; `ChildFailed` when the mail could not be examined;
`OSError` when the folder cannot be written.
"""

import abc
import asyncio
import base64
import contextlib
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from gateway.children import ChildFailed, Pool
from gateway.message import MailRefused

COMMAND = (sys.executable, "-I", "-m", "gateway.prepare_child")
"""How the pool starts its children."""
TURN_LIMIT = 10.0
"""Seconds that a picture waits until the one before it is drawn."""
_PREFIX = "prepare-"


class _Discarded(abc.ABC):
    """What leaves no file behind when its context ends."""

    __slots__ = ()

    def __enter__(self) -> Self:
        """Return this."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Discard the file."""
        self.discard()

    @abc.abstractmethod
    def discard(self) -> None:
        """Remove the file."""


@dataclass(frozen=True, slots=True)
class Prepared(_Discarded):
    """A mail whose document is ready to be stored; use it as a context, or call `discard`.

    `message_key` is over the received Message-ID, `digest` over the received attachments (`message.Mail`),
    `sha256`, `size` (octets) and `pages` are those of the file `document`.
    """

    message_id: str | None
    message_key: str | None
    subject: str
    references: str
    original_headers: bytes
    digest: str
    pages: int
    size: int
    sha256: str
    document: Path

    def discard(self) -> None:
        """Remove the document's file; harmless if it is gone."""
        self.document.unlink(missing_ok=True)


class Received(_Discarded):
    """A mail in a file of its own, while it comes in and until it is stored; a context, or call `discard`."""

    def __init__(self, handle: int, path: Path) -> None:
        self.file: BinaryIO = os.fdopen(handle, "wb")
        self.path = path

    def discard(self) -> None:
        """Remove the file, whatever is still to be written to it."""
        self.path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # the disk is full: what could not be written is not wanted
            self.file.close()


class Preparer:
    """Has mails prepared and pictures drawn by the children of `pool`, by way of files in `folder`."""

    def __init__(self, pool: Pool, folder: Path, *, max_pages: int, max_size: int) -> None:
        self._pool = pool
        self._folder = folder
        self._max_pages = max_pages
        self._max_size = max_size
        self._drawing = asyncio.Lock()

    @property
    def full(self) -> bool:
        """Whether a new mail should be put off (451) before its DATA is read."""
        return self._pool.full

    def sweep(self) -> None:
        """Make the folder if need be and remove what an earlier life left in it; for the start."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for leftover in self._folder.glob(_PREFIX + "*"):
            leftover.unlink(missing_ok=True)

    def receive(self) -> Received:
        """Return an empty file for a mail to come. Raises OSError."""
        with contextlib.ExitStack() as files:
            received = Received(*self._file(files))
            files.pop_all()
            return received

    async def mail(self, received: Received) -> Prepared:
        """Return the document that the mail asks for.

        Raises MailRefused with the answer for the sender; ChildFailed when the mail could not be examined, be
        it the machine's trouble or a document that hangs, bursts or kills its child: nobody can tell at the
        first try, so the door answers 451 and decides by itself how often; OSError when the folder cannot be
        written.
        """
        with contextlib.ExitStack() as files:
            made = self._empty_file(files)
            answer = await self._pool.run({
                "do": "mail", "path": str(received.path), "out": str(made),
                "max_pages": self._max_pages, "max_size": self._max_size,
            })  # fmt: skip
            try:
                if "refused" in answer:
                    raise MailRefused(**answer["refused"])
                ok = answer["ok"]
                ok["original_headers"] = base64.b64decode(ok["original_headers"])
                prepared = Prepared(document=made, **ok)
            except (KeyError, TypeError, ValueError) as fault:
                raise ChildFailed("fault", type(fault).__name__) from fault
            files.pop_all()
            return prepared

    async def picture(self, pdf: bytes) -> bytes | None:
        """Return the first page as PNG, or None if it cannot be drawn.

        Raises ChildFailed when that took longer than the pool's limit, burst or killed its child, or the pool
        is closed; TimeoutError when it was not its turn within `TURN_LIMIT`; OSError when the folder cannot
        be written.
        """
        async with asyncio.timeout(TURN_LIMIT):
            await self._drawing.acquire()
        try:
            return await self._drawn(pdf)
        finally:
            self._drawing.release()

    async def _drawn(self, pdf: bytes) -> bytes | None:
        with contextlib.ExitStack() as files:
            made = self._empty_file(files)
            handle, given = self._file(files)
            # Opened here and only written in the thread: if this is cancelled meanwhile, no file is left
            # behind.
            await asyncio.to_thread(_write, os.fdopen(handle, "wb"), pdf)
            try:
                await self._pool.run({"do": "picture", "path": str(given), "out": str(made)})
            except ChildFailed as failure:
                if failure.reason != "fault":
                    raise
                return None
            return made.read_bytes()

    def _file(self, files: contextlib.ExitStack) -> tuple[int, Path]:
        """Make an empty private file that `files` removes; return it open for writing, and its path."""
        handle, name = tempfile.mkstemp(prefix=_PREFIX, dir=self._folder)
        path = Path(name)
        files.callback(path.unlink, missing_ok=True)
        return handle, path

    def _empty_file(self, files: contextlib.ExitStack) -> Path:
        handle, path = self._file(files)
        os.close(handle)
        return path


def _write(file: BinaryIO, data: bytes) -> None:
    with file:
        file.write(data)
