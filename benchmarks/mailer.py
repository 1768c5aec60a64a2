"""Mails, each to a number of its own, from a process of its own.

`mailer.py LETTER FIRST COUNT SESSIONS PORT …`: COUNT mails with the content of the file LETTER, to the
numbers from place FIRST on, over so many sessions at a time, one connection for each mail, to the ports in
turn. It prints the time of the first connection; each mail must be answered 250.
"""

import asyncio
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from samples import SENDER, number


async def _expect(reader: asyncio.StreamReader, code: bytes) -> None:
    while True:
        line = await reader.readline()
        if line[:3] != code:
            raise SystemExit(f"wanted {code.decode()}, was told {line!r}")
        if line[3:4] != b"-":
            return


async def _mail(port: int, content: bytes, to: str) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    await _expect(reader, b"220")
    for line in ("EHLO client.example.com", f"MAIL FROM:<{SENDER}>", f"RCPT TO:<{to}@fax.local>"):
        writer.write(line.encode() + b"\r\n")
        await _expect(reader, b"250")
    writer.write(b"DATA\r\n")
    await _expect(reader, b"354")
    writer.write(content)
    await _expect(reader, b"250")
    writer.write(b"QUIT\r\n")
    writer.close()


async def main(content: bytes, first: int, count: int, sessions: int, ports: list[int]) -> None:
    """Send them."""
    places = iter(range(count))

    async def session(places: Iterator[int]) -> None:
        for place in places:
            await _mail(ports[place % len(ports)], content, number(first + place))

    async with asyncio.TaskGroup() as group:
        for _ in range(sessions):
            group.create_task(session(places))


if __name__ == "__main__":
    letter = (
        Path(sys.argv[1]).read_bytes().replace(b"\n", b"\r\n").replace(b"\r\n.", b"\r\n..") + b"\r\n.\r\n"
    )
    told_first, told_count, told_sessions, *told_ports = map(int, sys.argv[2:])
    print(time.time(), flush=True)
    asyncio.run(main(letter, told_first, told_count, told_sessions, told_ports))
