"""Signed webhooks over connections that are kept, from a process of its own.

`webhooks.py CONNECTIONS TYPE FILE PORT …`: one event of this type about each fax in the file, whose lines
hold the carrier's id and the number, to the ports in turn; the connections are shared out among them. All are
signed before the first is sent. It prints the seconds it took, and the longest and the middle time of an
answer in milliseconds; each must be 200.
"""

import asyncio
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from events import event, request


async def _connection(port: int, requests: Iterator[bytes], times: list[float]) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for each in requests:
        begun = time.perf_counter()
        writer.write(each)
        head = await reader.readuntil(b"\r\n\r\n")
        times.append(time.perf_counter() - begun)
        if not head.startswith(b"HTTP/1.1 200 ") or b"content-length: 0" not in head.lower():
            raise SystemExit(f"a webhook was answered {head!r}")
    writer.close()


async def main(connections: int, requests: dict[int, list[bytes]]) -> None:
    """Send to each port what is for it."""
    times: list[float] = []
    left = [(port, iter(its)) for port, its in requests.items()]
    begun = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for place in range(connections):
            port, its = left[place % len(left)]
            group.create_task(_connection(port, its, times))
    seconds = time.perf_counter() - begun
    milliseconds = {"middle": statistics.median(times) * 1000, "longest": max(times) * 1000}
    print(json.dumps({"seconds": seconds} | milliseconds))


if __name__ == "__main__":
    told_connections, kind, file, *told_ports = sys.argv[1:]
    rows = [line.split() for line in Path(file).read_text().splitlines()]
    ports = [int(port) for port in told_ports]
    signed = {
        port: [request(event(kind, *row), port) for row in rows[place :: len(ports)]]
        for place, port in enumerate(ports)
    }
    asyncio.run(main(int(told_connections), signed))
