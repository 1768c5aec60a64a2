"""A relay that takes every mail and keeps none, in a process of its own: `sink.py PORT`.

`XCOUNT`, a command of its own, is answered with the number of mails and the time of the last one.
"""

import asyncio
import sys
import time
from collections.abc import Callable

_ANSWERS = {b"EHLO": b"250 sink\r\n", b"DATA": b"354 go on\r\n", b"QUIT": b"221 bye\r\n"}
_END = b"\r\n.\r\n"


class Sink(asyncio.Protocol):
    """One conversation; `taken` is called with each mail's text."""

    def __init__(self, taken: Callable[[bytes], None], count: Callable[[], bytes] = lambda: b"") -> None:
        self._taken = taken
        self._count = count
        self._buffer = b""
        self._in_mail = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Greet."""
        self._transport: asyncio.WriteTransport = transport  # type: ignore[assignment]  # a socket's is one
        self._transport.write(b"220 sink\r\n")

    def data_received(self, data: bytes) -> None:
        """Answer what has come whole."""
        self._buffer += data
        while True:
            text, end, rest = self._buffer.partition(_END if self._in_mail else b"\r\n")
            if not end:
                return
            self._buffer = rest
            if self._in_mail:
                self._in_mail = False
                self._taken(text)
                self._transport.write(b"250 2.0.0 taken\r\n")
            else:
                self._command(text[:4].upper(), text)

    def _command(self, verb: bytes, line: bytes) -> None:
        if line == b"XCOUNT":
            self._transport.write(b"250 " + self._count() + b"\r\n")
            return
        self._in_mail = verb == b"DATA"
        self._transport.write(_ANSWERS.get(verb, b"250 2.0.0 ok\r\n"))
        if verb == b"QUIT":
            self._transport.close()


async def main(port: int) -> None:
    """Serve until it is ended."""
    count, last = 0, 0.0

    def taken(_text: bytes) -> None:
        nonlocal count, last
        count, last = count + 1, time.time()

    def told() -> bytes:
        return f"{count} {last}".encode()

    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Sink(taken, told), "127.0.0.1", port)
    print("ready", flush=True)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
